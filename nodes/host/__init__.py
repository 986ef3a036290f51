"""Everything that touches ComfyUI internals; nothing else in the pack does."""
