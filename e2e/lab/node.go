package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imdsgate/imdsgate/e2e/imds"
)

// Network is how a node's pods are wired, after the CNI plugins of the same names.
type Network int

// The wirings.
const (
	PTP    Network = iota // a veth per pod, routed by /32: every VPC CNI's and Calico's way
	Bridge                // pods share the bridge cni0
)

// NodeOptions of a Node. The zero value is a dual-stack node with ptp pods.
type NodeOptions struct {
	Network    Network
	IPv4Only   bool
	RPFilter   bool // strict reverse path filtering on every interface
	Masquerade bool // pods leave with the node's address, as with most CNI plugins
}

// Node is a Kubernetes node: a network namespace behind the fabric, with routing on, and a Node object.
type Node struct {
	Name  string
	IP    netip.Addr
	IPv6  netip.Addr // zero with IPv4Only
	Net   *Namespace
	Index int
	AWS   *AWS // what the node and its pods reach by AWS's names

	lab     *Lab
	options NodeOptions
	dir     string
	bridge  netlink.Link // with Bridge
	account string       // the daemon's service account in daemonNamespace

	mu      sync.Mutex
	pods    []*Pod
	daemons []*Daemon
	nextPod int
}

// AddNode makes a node.
func (l *Lab) AddNode(ctx context.Context, o NodeOptions) (_ *Node, err error) {
	l.mu.Lock()
	l.nodes = append(l.nodes, nil)
	i := len(l.nodes)
	l.mu.Unlock()
	if i > 240 {
		return nil, errors.New("a lab has room for 240 nodes")
	}
	n := &Node{
		Name: fmt.Sprintf("node-%d", i), Index: i, lab: l, options: o, nextPod: 2,
		IP:  netip.AddrFrom4([4]byte{172, 30, 0, byte(10 + i)}),
		dir: filepath.Join(l.dir, fmt.Sprintf("n%d", i)),
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("add %s: %w", n.Name, err), n.Close())
		}
	}()
	for _, dir := range []string{n.dir, n.runDir(), filepath.Join(n.dir, "home")} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, err
		}
	}
	if err := n.connect(); err != nil {
		return nil, err
	}
	if err := n.startAWS(ctx); err != nil {
		return nil, err
	}
	if err := n.register(ctx); err != nil {
		return nil, err
	}
	if err := n.SetPermissions(ctx, Permissions); err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.nodes[i-1] = n
	l.mu.Unlock()
	return n, nil
}

// connect wires the node to the fabric and prepares the network of its pods.
func (n *Node) connect() (err error) {
	fabric := n.lab.fabric
	if n.Net, err = newNamespace(fmt.Sprintf("%sn%d", n.lab.prefix, n.Index)); err != nil {
		return err
	}
	settings := []string{"net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"}
	if n.options.IPv4Only {
		settings = append(settings, "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
	}
	filter := "0"
	if n.options.RPFilter {
		filter = "1"
	}
	settings = append(settings, "net.ipv4.conf.all.rp_filter="+filter, "net.ipv4.conf.default.rp_filter="+filter)
	if err := n.Net.Sysctl(settings...); err != nil {
		return err
	}
	uplink, port, err := n.Net.addVeth("eth0", fabric, fmt.Sprintf("n%d", n.Index))
	if err != nil {
		return err
	}
	if err := fabric.link.LinkSetMaster(port, n.lab.bridge); err != nil {
		return err
	}
	v4, v6 := n.podNetworks()
	err = errors.Join(
		n.Net.addAddr(uplink, netip.PrefixFrom(n.IP, 16)),
		n.Net.addRoute(uplink, netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr(fabricIP)),
		fabric.addRoute(n.lab.bridge, v4, n.IP),
	)
	if err == nil && !n.options.IPv4Only {
		n.IPv6 = netip.MustParseAddr(fmt.Sprintf("fd00:30::%x", 16+n.Index))
		err = errors.Join(
			n.Net.addAddr(uplink, netip.PrefixFrom(n.IPv6, 64)),
			n.Net.addRoute(uplink, netip.MustParsePrefix("::/0"), netip.MustParseAddr(fabricIPv6)),
			fabric.addRoute(n.lab.bridge, v6, n.IPv6),
		)
	}
	if err == nil && n.options.Network == Bridge {
		if n.bridge, err = n.Net.addBridge("cni0", net.HardwareAddr{2, 0, 0x1e, 0, 0, 1}); err == nil {
			err = n.Net.addAddr(n.bridge, netip.PrefixFrom(v4.Addr().Next(), 24))
		}
		if err == nil && !n.options.IPv4Only {
			err = n.Net.addAddr(n.bridge, netip.PrefixFrom(v6.Addr().Next(), 64))
		}
	}
	if err == nil && n.options.Masquerade {
		err = n.Masquerade(context.Background())
	}
	return err
}

// Masquerade lets pods leave with the node's address, as most CNI plugins do.
func (n *Node) Masquerade(ctx context.Context) error {
	v4, _ := n.podNetworks()
	_, err := n.Run(ctx, "iptables", "-t", "nat", "-A", "POSTROUTING", "-s", v4.String(), "-o", "eth0", "-j", "MASQUERADE")
	return err
}

// podNetworks are the node's pod CIDRs.
func (n *Node) podNetworks() (v4, v6 netip.Prefix) {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(n.Index), 0}), 24),
		netip.MustParsePrefix(fmt.Sprintf("fd00:244:%x::/64", n.Index))
}

// register makes the Node object, and the daemon's own pod: a daemon asks whether anything is bound to its node.
func (n *Node) register(ctx context.Context) error {
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: n.Name, Labels: map[string]string{"kubernetes.io/hostname": n.Name}},
		Spec:       corev1.NodeSpec{PodCIDR: fmt.Sprintf("10.244.%d.0/24", n.Index)},
	}
	if _, err := n.lab.Kube.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{}); err != nil {
		return err
	}
	_, err := n.AddPod(ctx, PodSpec{Namespace: daemonNamespace, Name: "imdsgate-" + n.Name, HostNetwork: true})
	return err
}

// Addrs are all of the node's own addresses.
func (n *Node) Addrs() []netip.Addr {
	if n.IPv6.IsValid() {
		return []netip.Addr{n.IP, n.IPv6}
	}
	return []netip.Addr{n.IP}
}

func (n *Node) runDir() string { return filepath.Join(n.dir, "run") }

// Dir is a directory of the node's own, the same inside and outside.
func (n *Node) Dir() string { return n.dir }

// binds are what every process of the node and of its pods sees instead of the machine's files.
func (n *Node) binds() []bind {
	return []bind{{n.hosts(), "/etc/hosts"}, {n.resolvConf(), "/etc/resolv.conf"}}
}

func (n *Node) hosts() string      { return filepath.Join(n.dir, "hosts") }
func (n *Node) resolvConf() string { return filepath.Join(n.dir, "resolv.conf") }

// Command is a program on the node, with its network and its /run, and an environment that holds nothing of the machine's.
func (n *Node) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return n.Net.command(ctx, []bind{{n.runDir(), "/run"}}, cleanEnv(filepath.Join(n.dir, "home")), name, args...)
}

// Run runs a program on the node and returns what it wrote.
func (n *Node) Run(ctx context.Context, name string, args ...string) (string, error) {
	out, err := n.Command(ctx, name, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("run %s %v on %s: %w: %s", name, args, n.Name, err, out)
	}
	return string(out), nil
}

// Untouched says whether the node's real metadata endpoint has seen nothing of any pod of the node, and of the node itself
// nothing but what e allows. Its Nodes are filled in.
func (n *Node) Untouched(ctx context.Context, e imds.Expected) error {
	e.Nodes = n.Addrs()
	var pods []netip.Addr
	n.mu.Lock()
	for _, p := range n.pods {
		if !p.hostNetwork {
			pods = append(pods, p.IPs...)
		}
	}
	n.mu.Unlock()
	if len(pods) == 0 {
		return nil
	}
	return n.lab.IMDS.Untouched(ctx, pods, e)
}

// Close ends everything on the node and removes it. The Kubernetes objects stay.
func (n *Node) Close() error {
	n.mu.Lock()
	daemons, pods := n.daemons, n.pods
	n.mu.Unlock()
	for _, d := range daemons {
		d.Kill()
	}
	var errs []error
	for _, p := range pods {
		errs = append(errs, p.close())
	}
	errs = append(errs, n.stopAWS())
	if n.Net != nil {
		errs = append(errs, n.Net.close())
		n.Net = nil
	}
	n.lab.mu.Lock()
	n.lab.nodes[n.Index-1] = nil
	n.lab.mu.Unlock()
	return errors.Join(errs...)
}
