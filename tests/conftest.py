"""Settings of every test. Shared builders of small models belong to the room whose tests use them."""

import os

from hypothesis import settings

# Compilation inside an example takes seconds; in CI a failure must be repeatable from its log alone.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "default")
