"""A bundle over HTTP: `rarec serve BUNDLE`, or `rarec.serving.app:create` in a server of your own."""
