"""`python -m rlhf_cli`, and so `torchrun -m rlhf_cli ppo ...`."""

from __future__ import annotations

from rlhf_cli.main import app

if __name__ == "__main__":
    app()
