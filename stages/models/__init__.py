"""The frozen base, the roles on it, and what they read out of it."""
