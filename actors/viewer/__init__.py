"""The page in which imagined points turn."""

from actors.viewer.page import Camera, Group, Shown, write_viewer

__all__ = ["Camera", "Group", "Shown", "write_viewer"]
