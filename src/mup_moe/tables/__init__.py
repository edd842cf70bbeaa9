"""Tables made from the config and the corpora, without any trained cell: parametrizations, models, the bill."""
