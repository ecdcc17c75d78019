"""A strict reader of a page of HTML."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A page that is read strictly: its text, its tables, its pictures, its addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.tables, self.images, self.addresses, self.problems = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open and not self.problems, (self.open, self.problems)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [value for key, value in attributes.items() if key in ("src", "href", "xlink:href", "action")]
        if tag == "img":
            self.images.append(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("*" if "best" in attributes.get("class", "").split() else "")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append((tag, self.getpos()))

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data

    @property
    def words(self):
        return " ".join("".join(self.text).split())

    def table(self, row):
        """The table that has a row of this name: by column, its cell; "*" before the best."""
        for head, *rows in self.tables:
            for name, *cells in rows:
                if name == row:
                    return dict(zip(head[1:], cells, strict=True))
        raise KeyError(row)
