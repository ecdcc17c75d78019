"""The config nodes of this package, with a comment for each key."""

from detectron2.config import CfgNode

CN = CfgNode


def add_distill_config(cfg: CfgNode) -> None:
    """Adds the keys of this package to a Detectron2 config, in place.

    Args:
        cfg: what ``detectron2.config.get_cfg`` returns.
    """
    _C = cfg
    _C.DISTILL = CN()

    _C.DISTILL.STUDENT = CN()
    # The student's meta-architecture. The rest of MODEL.* describes the student, as in plain Detectron2.
    _C.DISTILL.STUDENT.META_ARCHITECTURE = "GeneralizedRCNN"
    # Prefixes of the student's weights that are copied from the teacher at the start, such as
    # "backbone.fpn_" or "roi_heads" (Kang et al., NeurIPS 2021). All that they name must fit.
    _C.DISTILL.STUDENT.INHERIT = []
    # The size at which the student sees the images, relative to the teacher: 1.0, or 0.5, 0.25 ... for aligned
    # distillation. MODEL.* and INPUT.*_TEST describe the student at its own size, INPUT.*_TRAIN is the teacher's.
    _C.DISTILL.STUDENT.INPUT_SCALE = 1.0
    # How training images become smaller for it: "bilinear" (antialiased, as Detectron2 resizes) or "nearest"
    _C.DISTILL.STUDENT.DOWNSAMPLING = "bilinear"
    # Levels of the student that are compared with one of another name, as "STUDENT=TEACHER", such as ["res4=p4"] for a
    # C4 student of a teacher with FPN. Their strides must agree.
    _C.DISTILL.STUDENT.LEVELS = []

    _C.DISTILL.TEACHER = CN()
    # A config file, or the name of a config in Detectron2's model zoo
    _C.DISTILL.TEACHER.CONFIG_FILE = ""
    # A file or URL. Empty: the model zoo's weights for a zoo config, else the MODEL.WEIGHTS of that config.
    _C.DISTILL.TEACHER.WEIGHTS = ""
    # Overrides of the teacher's config, as on the command line: [KEY, VALUE, ...]
    _C.DISTILL.TEACHER.OPTS = []

    # Names in DISTILLER_REGISTRY, such as "ReviewDistiller" or "review"; their losses add up. "Name/variant" is another
    # of the kind, with settings of its own.
    _C.DISTILL.DISTILLERS = []
    # The settings of variants, as keys of DISTILL that differ, such as {boxes: {IMITATION: {REGION: boxes}}}. A config
    # file defines them; the command line may change what is defined.
    _C.DISTILL.VARIANTS = CN(new_allowed=True)
    # Which classes of student and teacher are the same, for what compares classifications (LOGIT, GLOBAL's response):
    # [] (all, in one order), ["names"] (those of one name in both datasets), or pairs "STUDENT=TEACHER" of names or
    # numbers, such as ["pedestrian=person"] or ["0=14"]. Other methods ask for no classes.
    _C.DISTILL.CLASS_MAP = []
    # What the teacher and the distillers' own layers compute in: "auto" (as the training), "float32", "bfloat16" or
    # "float16". Losses are computed in float32 in any case.
    _C.DISTILL.PRECISION = "auto"
    # Modules to import first, so that the distillers in them register; their add_config(cfg), if any, adds keys
    _C.DISTILL.IMPORTS = []
    # Every so many iterations the gradient of each distiller at the student's features is measured and logged, as a
    # ratio to that of the detection losses. 0: never.
    _C.DISTILL.GRADIENT_LOG_PERIOD = 50
    # Scales every distiller's losses so that this ratio, in its running average, is the one given here, before
    # LOSS_WEIGHT. 0: off, as the papers have it, whose weights suit their own data.
    _C.DISTILL.BALANCE = 0.0

    # Knowledge review (arXiv 2104.09044)
    _C.DISTILL.REVIEW = CN()
    add_weight_config(_C.DISTILL.REVIEW)
    # FPN levels to compare, such as ["p3", "p4"]. Empty: all that student and teacher share.
    _C.DISTILL.REVIEW.LEVELS = []
    # Channels inside the fusion modules
    _C.DISTILL.REVIEW.MID_CHANNELS = 256
    # Norm of the fusion modules, in Detectron2's terms: "BN", "SyncBN", "GN", "" ...
    _C.DISTILL.REVIEW.NORM = "BN"
    # Sizes that the maps are pooled to, besides their own, in the hierarchical context loss
    _C.DISTILL.REVIEW.POOL_SIZES = [4, 2, 1]
    # What compares the reviewed features: "HCL" (hierarchical context loss, as published) or "SSIM", with the settings
    # of STRUCTURAL
    _C.DISTILL.REVIEW.CRITERION = "HCL"

    # Structural similarity (arXiv 2211.13133)
    _C.DISTILL.STRUCTURAL = CN()
    add_weight_config(_C.DISTILL.STRUCTURAL)
    # FPN levels to compare. Empty: all that student and teacher share.
    _C.DISTILL.STRUCTURAL.LEVELS = []
    # Convolution from the student's to the teacher's channels: "1x1", "3x3", or "auto": 1x1 where the channels differ,
    # none where they agree
    _C.DISTILL.STRUCTURAL.ADAPTATION = "auto"
    # How both sides come to one scale: "none" (as they are, in the teacher's range of the level over the batch),
    # "minmax" (the teacher's minimum and maximum of the level over the batch become 0 and 1), "own_minmax" (published:
    # each side's own become 0 and 1) or "standard" (the teacher's mean and deviation of each channel become 0 and 1)
    _C.DISTILL.STRUCTURAL.SCALE = "none"
    # The Gaussian window, in cells, and the constants that keep the quotients stable
    _C.DISTILL.STRUCTURAL.WINDOW_SIZE = 11
    _C.DISTILL.STRUCTURAL.SIGMA = 1.5
    _C.DISTILL.STRUCTURAL.K1 = 0.01
    _C.DISTILL.STRUCTURAL.K2 = 0.03
    # Exponents of luminance, contrast and structure; 0 leaves a term out
    _C.DISTILL.STRUCTURAL.EXPONENTS = [1.0, 1.0, 1.0]

    # Imitation: a norm of the difference of the features
    _C.DISTILL.IMITATION = CN()
    add_weight_config(_C.DISTILL.IMITATION)
    # FPN levels to compare. Empty: all that student and teacher share.
    _C.DISTILL.IMITATION.LEVELS = []
    # As STRUCTURAL.ADAPTATION
    _C.DISTILL.IMITATION.ADAPTATION = "auto"
    # "l1", "l2" (squared) or "smooth_l1"
    _C.DISTILL.IMITATION.NORM = "l2"
    # Which cells count: "all", "boxes" (those that touch a ground-truth box) or "gaussian" (a Gaussian around the
    # centre of each box, as wide and high as the box asks for)
    _C.DISTILL.IMITATION.REGION = "all"

    # Global knowledge (arXiv 2210.09022). DECAY is for its global and local parts; the response part keeps its weight.
    _C.DISTILL.GLOBAL = CN()
    add_weight_config(_C.DISTILL.GLOBAL)
    _C.DISTILL.GLOBAL.DECAY = 1.0
    # FPN levels to compare. Empty: all that student and teacher share. The sizes of boxes are spread over these.
    _C.DISTILL.GLOBAL.LEVELS = []
    # Prototypes of a class at a level, and how they are picked, see distill.prototypes.select_prototypes
    _C.DISTILL.GLOBAL.NUM_PROTOTYPES = 10
    _C.DISTILL.GLOBAL.ALPHA = 10.0
    _C.DISTILL.GLOBAL.DENSITY_SIGMA = 0.1
    _C.DISTILL.GLOBAL.DENSITY_QUANTILE = 0.4
    # Iterations from one search for prototypes to the next. 0: an epoch.
    _C.DISTILL.GLOBAL.UPDATE_PERIOD = 0
    # Images that are searched for a class, and what the shorter side of a box must exceed, in pixels of the image file
    _C.DISTILL.GLOBAL.MAX_IMAGES = 800
    _C.DISTILL.GLOBAL.MIN_BOX_SIZE = 30
    # Which boxes are compared, in all parts: "proposals" (the student's sampled positive ones; of a dense detector, the
    # annotations) or "ground_truth"
    _C.DISTILL.GLOBAL.INSTANCES = "proposals"
    # Distances to the prototypes
    _C.DISTILL.GLOBAL.GLOBAL_ON = True
    _C.DISTILL.GLOBAL.GLOBAL_WEIGHT = 5.0
    # Features, inside and outside of the boxes
    _C.DISTILL.GLOBAL.LOCAL_ON = True
    _C.DISTILL.GLOBAL.LOCAL_WEIGHT = 1.0
    _C.DISTILL.GLOBAL.LOCAL_FOREGROUND_WEIGHT = 1.0
    _C.DISTILL.GLOBAL.LOCAL_BACKGROUND_WEIGHT = 4.0
    # Empty: their squared difference. Or a distiller that takes weights, such as "ImitationDistiller", with the
    # settings of its own node but for WARMUP_ITERS and DECAY
    _C.DISTILL.GLOBAL.LOCAL_DISTILLER = ""
    # Classifications of the same boxes, softened by the temperature
    _C.DISTILL.GLOBAL.RESPONSE_ON = True
    _C.DISTILL.GLOBAL.RESPONSE_WEIGHT = 1.0
    _C.DISTILL.GLOBAL.TEMPERATURE = 2.0

    # Multi-scale aligned distillation (arXiv 2109.04875). The weight is published as T^2 a / T, T = 3, a = 0.2.
    _C.DISTILL.ALIGNED = CN()
    add_weight_config(_C.DISTILL.ALIGNED, loss_weight=0.6)
    _C.DISTILL.ALIGNED.WARMUP_ITERS = 500
    # Levels to compare, by the teacher's names. Empty: all that lie on each other.
    _C.DISTILL.ALIGNED.LEVELS = []
    # As STRUCTURAL.ADAPTATION
    _C.DISTILL.ALIGNED.ADAPTATION = "auto"

    # Focal and global distillation (arXiv 2111.11837). The factors are those of detectors with a box head (with p2 to
    # p5); published for RetinaNet: 1e-3, 5e-4, 5e-4, 5e-6; for FCOS: 1.6e-3, 8e-4, 8e-4, 8e-6 and temperature 0.8.
    _C.DISTILL.FGD = CN()
    add_weight_config(_C.DISTILL.FGD)
    # FPN levels to compare. Empty: all that student and teacher share.
    _C.DISTILL.FGD.LEVELS = []
    # As STRUCTURAL.ADAPTATION
    _C.DISTILL.FGD.ADAPTATION = "auto"
    # Of the attention maps
    _C.DISTILL.FGD.TEMPERATURE = 0.5
    # Factors of the features in boxes and outside, of the attention maps, and of what is gathered globally
    _C.DISTILL.FGD.FOREGROUND_WEIGHT = 5e-5
    _C.DISTILL.FGD.BACKGROUND_WEIGHT = 2.5e-5
    _C.DISTILL.FGD.ATTENTION_WEIGHT = 5e-5
    _C.DISTILL.FGD.GLOBAL_WEIGHT = 5e-7

    # Masked generative distillation (arXiv 2205.01529). Weight and mask are those of detectors with a box head (with p2
    # to p5); published for dense ones: 2e-5 and 0.65.
    _C.DISTILL.MGD = CN()
    add_weight_config(_C.DISTILL.MGD, loss_weight=5e-7)
    # FPN levels to compare. Empty: all that student and teacher share.
    _C.DISTILL.MGD.LEVELS = []
    # As STRUCTURAL.ADAPTATION
    _C.DISTILL.MGD.ADAPTATION = "auto"
    # The share of the student's cells that is masked
    _C.DISTILL.MGD.MASK_RATIO = 0.45

    # Channel-wise distillation (arXiv 2011.13256), with weight and temperature of MMRazor's detectors
    _C.DISTILL.CWD = CN()
    add_weight_config(_C.DISTILL.CWD, loss_weight=10.0)
    # FPN levels to compare. Empty: all that student and teacher share.
    _C.DISTILL.CWD.LEVELS = []
    # As STRUCTURAL.ADAPTATION
    _C.DISTILL.CWD.ADAPTATION = "auto"
    # The larger, the more cells count
    _C.DISTILL.CWD.TEMPERATURE = 1.0

    # Pearson correlation (PKD, arXiv 2207.02039). Published: 6 for teachers with a box head, 10 for dense ones
    _C.DISTILL.PEARSON = CN()
    add_weight_config(_C.DISTILL.PEARSON, loss_weight=6.0)
    # FPN levels to compare. Empty: the four finest that student and teacher share, as published.
    _C.DISTILL.PEARSON.LEVELS = []
    # As STRUCTURAL.ADAPTATION
    _C.DISTILL.PEARSON.ADAPTATION = "auto"

    # Cross-head distillation (CrossKD, arXiv 2306.11369), with the weights for RetinaNet; published for FCOS:
    # CLASS_WEIGHT 0.4, BOX_WEIGHT 0.75, NUM_TEACHER_CONVS 2
    _C.DISTILL.CROSSKD = CN()
    add_weight_config(_C.DISTILL.CROSSKD)
    # How many convolutions at the end of the teacher's towers the student's features go through
    _C.DISTILL.CROSSKD.NUM_TEACHER_CONVS = 1
    # Whether each channel of these features first gets the mean and deviation of the teacher's, as in the authors' code
    _C.DISTILL.CROSSKD.ALIGN_SCALE = False
    # As STRUCTURAL.ADAPTATION
    _C.DISTILL.CROSSKD.ADAPTATION = "auto"
    # Exponent of the quality focal loss
    _C.DISTILL.CROSSKD.BETA = 1.0
    # Factors of classification and boxes
    _C.DISTILL.CROSSKD.CLASS_WEIGHT = 1.0
    _C.DISTILL.CROSSKD.BOX_WEIGHT = 1.0

    # Classifications
    _C.DISTILL.LOGIT = CN()
    add_weight_config(_C.DISTILL.LOGIT)
    # "KD" (soft labels, arXiv 1503.02531), "DKD" (decoupled, 2203.08679), or for dense detectors "BCKD" (class by class
    # at all anchors, and their boxes, 2308.14286)
    _C.DISTILL.LOGIT.KIND = "KD"
    # Of KD and DKD, as GLOBAL.INSTANCES
    _C.DISTILL.LOGIT.INSTANCES = "proposals"
    # Of KD and DKD
    _C.DISTILL.LOGIT.TEMPERATURE = 1.0
    # Of DKD: factors of the true class against the others, and of the others beside each other
    _C.DISTILL.LOGIT.ALPHA = 1.0
    _C.DISTILL.LOGIT.BETA = 0.25
    # Of BCKD: factor of the boxes' loss
    _C.DISTILL.LOGIT.BOX_WEIGHT = 4.0

    # Datasets to register first: "name=voc:ROOT:SPLIT[:class,class,...]", "name=coco:JSON:IMAGE_ROOT[:SPLIT]" or
    # "name=yolo:data.yaml:SPLIT". Without lists of images, SPLIT is "all", or a share: 0.8, and -0.2 for its rest
    _C.DATASETS.REGISTER = []
    # Faults in their images and boxes: "error", "skip" (faulty images are left out), "off" (not looked for)
    _C.DATASETS.CHECK = "error"
    # By which metric they are evaluated: "coco", "voc", or "" for the format's own
    _C.DATASETS.METRIC = ""
    # What is done with an image whose file is cut off: "error" (a fault, see DATASETS.CHECK), or "load" what is there
    _C.INPUT.TRUNCATED = "error"

    # "SGD" (with SOLVER.MOMENTUM and NESTEROV) or "AdamW"
    _C.SOLVER.OPTIMIZER = "SGD"
    # Batches of IMS_PER_BATCH images whose mean gradient makes a step, where a GPU holds too few images. Iterations
    # count steps.
    _C.SOLVER.ACCUMULATE = 1

    # Of mixed precision: "float16", "bfloat16", or "auto": float16 on CUDA, as Detectron2 has it, bfloat16 on the CPU
    _C.SOLVER.AMP.PRECISION = "auto"

    # Factor of all of the ResNet's widths, for build_slimmable_resnet_fpn_backbone: 0.25, 0.5, 0.75 or 1.0
    _C.MODEL.RESNETS.WIDTH_MULT = 1.0

    # The multi-scale teacher of aligned distillation, for META_ARCHITECTURE AlignedTeacher
    _C.MODEL.ALIGNED_TEACHER = CN()
    # The detector that it is: "RetinaNet", "FCOS" or "GeneralizedRCNN". The rest of MODEL.* describes it; its heads
    # take all of the FPN's levels but the finest, such as p3 to p7 where the FPN begins at p2.
    _C.MODEL.ALIGNED_TEACHER.META_ARCHITECTURE = "RetinaNet"
    # How the half-size image comes from the whole one in training: "nearest" (published) or "bilinear" (antialiased)
    _C.MODEL.ALIGNED_TEACHER.DOWNSAMPLING = "nearest"
    # Factor of the losses on the fused features
    _C.MODEL.ALIGNED_TEACHER.FUSED_LOSS_WEIGHT = 0.4
    # The fusion's hidden layer has 2 * FPN.OUT_CHANNELS / REDUCTION channels
    _C.MODEL.ALIGNED_TEACHER.REDUCTION = 16
    # Filled in by AlignedTeacher: the MODEL.BACKBONE.NAME that its own backbone is built around
    _C.MODEL.ALIGNED_TEACHER.BACKBONE = ""
    # Which pyramid an AlignedTeacher detects on, and teaches: "high" (the whole image), "low" (half its size) or both,
    # "fused"
    _C.TEST.SCALES = "fused"
    # What model_best.pth is the best in, such as "segm/AP" or, of several test sets, "NAME/segm/AP". Empty: box AP,
    # else mask AP, PQ or mIoU, of the first test set.
    _C.TEST.BEST_METRIC = ""

    # timm's networks, for build_timm_fpn_backbone
    _C.MODEL.TIMM = CN()
    # A name of timm's, such as "mobilenetv4_conv_small"; see timm.list_models()
    _C.MODEL.TIMM.NAME = "mobilenetv2_100"
    # Which of timm's stages the FPN takes, finest first, by timm's numbers. Empty: all of stride 4 and more. A head on
    # P3 to P7 uses those of strides 8 to 32 alone: [2, 3, 4] of most networks, [1, 2, 3] of those that begin at stride
    # 4. MODEL.BACKBONE.FREEZE_AT counts strides, not these.
    _C.MODEL.TIMM.OUT_INDICES = []
    # What the network's batch norms are: "BN", "FrozenBN", "SyncBN" or "GN"
    _C.MODEL.TIMM.NORM = "FrozenBN"
    # Empty: random; one of timm's pretrained tags, such as "ra_in1k" (downloaded, or cached); a file with a state dict
    # of the whole network; or "package:NAME", the weights that an installed package holds
    _C.MODEL.TIMM.WEIGHTS = ""

    # FCOS, which Detectron2 has as Python only; the losses and the heads are Detectron2's
    _C.MODEL.FCOS = CN()
    # Without background
    _C.MODEL.FCOS.NUM_CLASSES = 80
    # Levels that the head takes
    _C.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions in each tower of the head, and the norm after them
    _C.MODEL.FCOS.NUM_CONVS = 4
    _C.MODEL.FCOS.NORM = "GN"
    # Foreground probability that the classification starts from
    _C.MODEL.FCOS.PRIOR_PROB = 0.01
    # A point is positive within this many strides of a box's centre
    _C.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # Of the focal loss of the classification
    _C.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    _C.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # A detection's score is the square root of its class score times its centerness; those below are dropped. Of each
    # level the best so many go on to non-maximum suppression, at this overlap.
    _C.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    _C.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    _C.MODEL.FCOS.NMS_THRESH_TEST = 0.6


def add_weight_config(node: CfgNode, loss_weight: float = 1.0) -> None:
    """Adds the keys that every distiller has to its config node, in place.

    Args:
        node: the node of a distiller, such as ``cfg.DISTILL.REVIEW``.
        loss_weight: the default of LOSS_WEIGHT.
    """
    # Factor of the distiller's losses
    node.LOSS_WEIGHT = loss_weight
    # The weight grows linearly from zero over so many iterations. 0: it is there at once.
    node.WARMUP_ITERS = 0
    # The weight falls linearly to zero over this last part of the training, from 0 (never) to 1 (all along)
    node.DECAY = 0.0
