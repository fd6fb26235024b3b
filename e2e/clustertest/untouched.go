package clustertest

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/imdsgate/imdsgate/e2e/cluster/control"
	"github.com/imdsgate/imdsgate/e2e/imds"
)

// Mark is a moment in the memory of the real metadata endpoint.
type Mark struct {
	requests int
	packets  map[imds.Packets]int
}

// Mark remembers what has reached the real metadata endpoint up to now.
func (c *Cluster) Mark(ctx context.Context) (Mark, error) {
	requests, err := c.Fabric.Requests(ctx, 0)
	if err != nil {
		return Mark{}, err
	}
	m := Mark{requests: len(requests), packets: map[imds.Packets]int{}}
	packets, err := c.Fabric.Packets(ctx)
	for _, p := range packets {
		n := p.Count
		p.Count = 0
		m.packets[p] = n
	}
	return m, err
}

// Untouched says whether the real metadata endpoint has been, since the mark, as pods may leave it: no packet of a pod has
// arrived, on any port, in any protocol, and every request of a node is one that the daemon builds from its table, or the
// SDK's own for the node role. It cannot tell pods from nodes in a cluster with Options.Masquerade, and takes hostNetwork pods
// for the node.
func (c *Cluster) Untouched(ctx context.Context, since Mark, e imds.Expected) error {
	var errs []error
	packets, err := c.Fabric.Packets(ctx)
	if err != nil {
		return err
	}
	for _, p := range packets {
		key := p
		key.Count = 0
		p.Count -= since.packets[key]
		node, pod := control.NodeOf(p.Source)
		switch {
		case p.Count == 0:
		case pod:
			errs = append(errs, fmt.Errorf("a pod of node%d reached the real metadata endpoint: %s", node, p))
		case node != 0 && (p.Protocol != "tcp" || p.Port != 80):
			errs = append(errs, fmt.Errorf("node%d sent something else than HTTP to its metadata endpoint: %s", node, p))
		}
	}
	requests, err := c.Fabric.Requests(ctx, since.requests)
	if err != nil {
		return err
	}
	for _, r := range requests {
		switch node, pod := control.NodeOf(r.Source); {
		case pod:
			errs = append(errs, fmt.Errorf("a request of a pod of node%d reached the real metadata endpoint: %s", node, r))
		case !e.Permits(r):
			errs = append(errs, fmt.Errorf("node%d sent a request that no table of the daemon built: %s %v", node, r, r.Header))
		}
	}
	return errors.Join(errs...)
}

// AssertUntouched fails the test unless the endpoint is untouched since the mark.
func (c *Cluster) AssertUntouched(t testing.TB, since Mark, e imds.Expected) {
	t.Helper()
	if err := c.Untouched(t.Context(), since, e); err != nil {
		t.Error(err)
	}
}
