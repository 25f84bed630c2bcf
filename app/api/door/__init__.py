"""What stands between a socket and a route: connections, requests and their bodies, bounded, counted and told of."""
