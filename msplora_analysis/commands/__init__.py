"""The commands of ``msplora-analyze``, one module each. To add one, add its module: it is found by itself."""

# The order of the help. A command that is not named here comes after these.
ORDER = (
    "advise", "spectra", "figures", "redundancy", "relate", "compare", "diagnose", "report", "results", "export",
    "check", "compress", "merge", "extract", "share", "card", "watch",
)  # fmt: skip
