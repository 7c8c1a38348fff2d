"""The demo that is real: our own drawings, two tiny bases trained on them, and the measure of what they draw."""
