"""latentd for ComfyUI: copy this folder into custom_nodes."""

import sys

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

WEB_DIRECTORY = "web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]

if "server" in sys.modules:  # ComfyUI's: the rest of the folder can be looked at without it
    from . import listing

    listing.add_route()
