"""Conditional samplers that train nothing: one file each, a denoiser that wraps a denoiser."""
