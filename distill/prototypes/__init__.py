"""Prototypes of classes: how they are picked, and how their candidates are collected from a dataset."""

from .select import dense_instances, select_prototypes

__all__ = ["dense_instances", "select_prototypes"]
