"""What several formats share: settings, parts of modules, structures of factors, names. A format here is none."""
