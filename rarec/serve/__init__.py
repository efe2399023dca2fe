"""A bundle over HTTP: `rarec serve BUNDLE`, or `rarec.serve.app:create` in a server of your own."""
