from hypothesis import settings

# The first call into a library may load or compile for a second.
settings.register_profile("formats", deadline=None)
settings.load_profile("formats")
