"""The model under test: prepared for a device, checked before it is attacked, guarded while it answers."""
