package clustertest

import (
	"context"
	"fmt"
	"testing"

	"github.com/imdsgate/imdsgate/e2e/cluster/control"
	"github.com/imdsgate/imdsgate/e2e/imds"
)

// Mark is a moment in the memory of the real metadata endpoint.
type Mark struct {
	fabric   *control.Client
	requests int
	packets  map[imds.Packets]int
}

// Mark remembers what has reached the real metadata endpoint up to now.
func (c *Cluster) Mark(ctx context.Context) (Mark, error) { return NewMark(ctx, c.Fabric) }

// NewMark is Mark for who has no Cluster.
func NewMark(ctx context.Context, fabric *control.Client) (Mark, error) {
	requests, err := fabric.Requests(ctx, 0)
	if err != nil {
		return Mark{}, err
	}
	m := Mark{fabric: fabric, requests: len(requests), packets: map[imds.Packets]int{}}
	packets, err := fabric.Packets(ctx)
	for _, p := range packets {
		n := p.Count
		p.Count = 0
		m.packets[p] = n
	}
	return m, err
}

// Reached is what has reached the endpoint since and must not have: packets of anybody but the nodes, on any port, in any protocol;
// packets of nodes that are not HTTP's; requests that neither the daemon builds from its table nor the SDK for the node role. It
// cannot tell pods from nodes in a cluster with Options.Masquerade, and takes hostNetwork pods for the node.
func (m Mark) Reached(ctx context.Context, e imds.Expected) (found []string, err error) {
	packets, err := m.fabric.Packets(ctx)
	if err != nil {
		return nil, err
	}
	for _, p := range packets {
		key := p
		key.Count = 0
		if p.Count -= m.packets[key]; p.Count == 0 {
			continue
		}
		if node, pod := control.NodeOf(p.Source); node == 0 || pod || p.Protocol != "tcp" || p.Port != 80 {
			found = append(found, p.String())
		}
	}
	requests, err := m.fabric.Requests(ctx, m.requests)
	for _, r := range requests {
		if node, pod := control.NodeOf(r.Source); node == 0 || pod || !e.Permits(r) {
			found = append(found, fmt.Sprint(r, " ", r.Header))
		}
	}
	return found, err
}

// AssertUntouched fails the test if anything has reached the endpoint since that must not have.
func (m Mark) AssertUntouched(t testing.TB, e imds.Expected) {
	t.Helper()
	found, err := m.Reached(t.Context(), e)
	if err != nil {
		t.Error(err)
	}
	if len(found) > 0 {
		t.Errorf("the nodes' real metadata endpoint was reached: %d times, such as %s", len(found), found[0])
	}
}
