"""One page about a run: measures of a network (`measure`), figures (`figures`), the page (`page`), a run (`run`)."""
