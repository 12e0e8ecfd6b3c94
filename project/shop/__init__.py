"""A small shop: the example application for ``conductor_app``."""
