"""What every test may rely on, wherever it runs."""

import os
import signal

# No test reads or fills the user's cache of spectra.
os.environ["MSPLORA_CACHE"] = ""
# A shell lets a background job ignore Ctrl-C. The commands that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
