"""Spa3-VLM (arXiv 2602.21186, section 3.3): Qwen2.5-VL with a residual cross-attention to spatial latents."""
