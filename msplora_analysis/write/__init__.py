"""Adapters as plain PEFT LoRA: what of one is a sum of products, joined or cut to fewer directions, and written."""
