package lab

import "fmt"

// Sandbox makes an empty network namespace, for a CNI plugin to fill. It goes with Remove, or with the lab.
func (l *Lab) Sandbox() (*Namespace, error) {
	n, err := newNamespace(l.prefix + l.Unique("s"))
	if err != nil {
		return nil, fmt.Errorf("make a sandbox: %w", err)
	}
	return n, nil
}

// Remove lets go of a namespace that Sandbox made.
func (n *Namespace) Remove() error { return n.close() }
