"""No test reads or fills the user's cache of spectra."""

import os

os.environ["MSPLORA_CACHE"] = ""
