"""Forward passes: token trees, label tries, LoRA layers, generation. Knows no task."""
