"""A report on a run as one HTML page: measurements (`measure`), contents (`content`), page (`page`), run (`run`)."""
