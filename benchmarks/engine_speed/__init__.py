"""The engines side by side: samples a second, and what an update in flight saves."""
