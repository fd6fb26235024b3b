package clustertest

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"

	"github.com/imdsgate/imdsgate/e2e/cluster/control"
)

// Node is one of a cluster, up or down.
type Node struct {
	Index   int // from 1
	Name    string
	cluster *Cluster
}

// Node is node i, 1 to 9.
func (c *Cluster) Node(i int) *Node {
	return &Node{Index: i, Name: fmt.Sprintf("node%d", i), cluster: c}
}

// IP is the node's address.
func (n *Node) IP() netip.Addr { return control.NodeIP(n.Index) }

// Down cuts the node's power: nothing in it is told.
func (n *Node) Down(ctx context.Context) error {
	_, err := n.cluster.script(ctx, nil, "node-down", strconv.Itoa(n.Index))
	return err
}

// Up boots the node, and waits until it is Ready. The options count at its first boot only.
func (n *Node) Up(ctx context.Context, o Options) error {
	_, err := n.cluster.script(ctx, o.env(), "node-up", strconv.Itoa(n.Index))
	return err
}

// Run runs a program in the node's namespaces and returns its output.
func (n *Node) Run(ctx context.Context, command ...string) (string, error) {
	return n.cluster.script(ctx, nil, append([]string{"in", n.Name}, command...)...)
}
