"""The main job of `tunerkit demo`."""
