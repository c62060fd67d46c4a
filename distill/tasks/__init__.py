"""What a single task needs: its rows, its prompts, its decoder, its sandbox."""
