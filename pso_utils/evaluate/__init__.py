"""The evaluation: a base and its LoRAs on the same prompts and noise (`python -m pso_utils.evaluate`)."""
