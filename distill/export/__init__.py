"""Taking a trained model elsewhere: GGUF files, a real llama.cpp, and the proof that both answer alike."""
