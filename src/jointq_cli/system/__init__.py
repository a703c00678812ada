"""Files, locks, the store, processes and the machine; nothing of models, text or quantisation."""
