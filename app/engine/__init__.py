"""Jobs, queues, plans, the model cache and the device workers. Asks no HTTP, reads no file format."""
