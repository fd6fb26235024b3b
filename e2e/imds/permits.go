package imds

// Permits tells whether a request of the node is one that the daemon builds, or the SDK's own for the node role.
func (e Expected) Permits(r Request) bool { return e.permits(r) }
