"""What the three trainers share."""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL sends telemetry otherwise
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
