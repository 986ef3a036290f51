"""Lens for ComfyUI: the pack's entry point. Importing this imports nothing else."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's entry point; ComfyUI logs one line if it raises, so the traceback is logged here."""
    import logging

    try:
        from .nodes import LensExtension
    except Exception:
        logging.getLogger(__name__).exception("Lens could not be loaded")
        raise
    return LensExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
