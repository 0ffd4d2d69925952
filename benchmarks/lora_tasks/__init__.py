"""Parts of `lora.py`."""
