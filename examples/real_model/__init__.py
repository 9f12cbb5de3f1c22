"""A real pretrained model on a CPU: SmolLM2-135M-Instruct learns sums by AAPO, GPG and GRPO (scripts/real_model.sh)."""
