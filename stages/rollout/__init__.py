"""Prompts to responses, responses to scores."""
