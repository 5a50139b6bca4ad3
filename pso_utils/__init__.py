"""Pairwise Sample Optimization (PSO) for timestep-distilled diffusion models."""

__version__ = "0.1.0"
