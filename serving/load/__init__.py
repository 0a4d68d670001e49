"""Load for a server: arrivals, requests, and the client that sends them."""
