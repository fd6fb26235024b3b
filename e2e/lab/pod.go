package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// PodSpec describes a Pod. The zero value is an ordinary pod of the default service account in a namespace of its own.
type PodSpec struct {
	Namespace      string // empty: a new one
	Name           string // empty: a new one
	ServiceAccount string // made when it is missing; empty: default
	Annotations    map[string]string
	Env            map[string]string // of its container, as far as the API server is told
	HostNetwork    bool
	IP             netip.Addr // IPv4 address; zero: the node's next one
	StartTime      time.Time  // status.startTime; zero: now
	// Pending leaves status without addresses, as before kubelet's first report: SetRunning sends it.
	Pending bool
	// Detached makes the Pod object alone, without a network namespace.
	Detached bool
}

// Pod is a pod of a node: a network namespace wired to it, and a Pod object bound to it.
type Pod struct {
	Namespace, Name, ServiceAccount string
	UID                             types.UID
	IPs                             []netip.Addr // of status: IPv4 first
	Net                             *Namespace   // nil when Detached
	Node                            *Node

	startTime   time.Time
	hostNetwork bool
	home        string

	mu     sync.Mutex
	veth   netlink.Link // on the node
	client *http.Client
}

// AddPod makes a pod, and its namespace and service account when they are missing.
func (n *Node) AddPod(ctx context.Context, s PodSpec) (_ *Pod, err error) {
	p := &Pod{
		Namespace: s.Namespace, Name: s.Name, ServiceAccount: s.ServiceAccount,
		Node: n, startTime: s.StartTime, hostNetwork: s.HostNetwork,
	}
	if p.Namespace == "" {
		p.Namespace = n.lab.Unique("team")
	}
	if p.Name == "" {
		p.Name = n.lab.Unique("pod")
	}
	if p.ServiceAccount == "" {
		p.ServiceAccount = "default"
	}
	if p.startTime.IsZero() {
		p.startTime = time.Now()
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("add pod %s/%s to %s: %w", p.Namespace, p.Name, n.Name, err)
		}
	}()
	n.mu.Lock()
	number := n.nextPod
	if !s.HostNetwork {
		n.nextPod++
	}
	n.pods = append(n.pods, p)
	n.mu.Unlock()
	if number > 250 {
		return nil, errors.New("a node has room for 249 pods")
	}
	if err := p.create(ctx, s); err != nil {
		return nil, err
	}
	switch {
	case s.HostNetwork:
		p.Net, p.IPs = n.Net, n.Addrs()
	default:
		p.IPs = n.podIPs(number, s.IP)
		if !s.Detached {
			if err := p.plug(number); err != nil {
				return nil, err
			}
		}
	}
	p.home = filepath.Join(n.dir, "home-"+p.Namespace+"-"+p.Name)
	if err := os.MkdirAll(p.home, 0o755); err != nil {
		return nil, err
	}
	if s.Pending {
		return p, nil
	}
	return p, p.SetRunning(ctx)
}

func (n *Node) podIPs(number int, v4 netip.Addr) []netip.Addr {
	if v4.IsValid() {
		number = int(v4.As4()[3])
	}
	ips := []netip.Addr{netip.AddrFrom4([4]byte{10, 244, byte(n.Index), byte(number)})}
	if !n.options.IPv4Only {
		ips = append(ips, netip.MustParseAddr(fmt.Sprintf("fd00:244:%x::%x", n.Index, number)))
	}
	return ips
}

// create makes the Pod object, bound to the node as the scheduler would.
func (p *Pod) create(ctx context.Context, s PodSpec) error {
	lab := p.Node.lab
	container := corev1.Container{Name: "main", Image: "none"}
	for name, value := range s.Env {
		container.Env = append(container.Env, corev1.EnvVar{Name: name, Value: value})
	}
	object := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, Annotations: s.Annotations},
		Spec: corev1.PodSpec{
			NodeName: p.Node.Name, ServiceAccountName: p.ServiceAccount, HostNetwork: s.HostNetwork,
			Containers: []corev1.Container{container},
		},
	}
	pods := lab.Kube.CoreV1().Pods(p.Namespace)
	created, err := pods.Create(ctx, object, metav1.CreateOptions{})
	if apierrors.IsNotFound(err) || apierrors.IsForbidden(err) { // no namespace, no service account
		if err := lab.ensureNamespace(ctx, p.Namespace); err != nil {
			return err
		}
		account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.ServiceAccount}}
		_, err = lab.Kube.CoreV1().ServiceAccounts(p.Namespace).Create(ctx, account, metav1.CreateOptions{})
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return err
		}
		created, err = pods.Create(ctx, object, metav1.CreateOptions{})
	}
	if err != nil {
		return err
	}
	p.UID = created.UID
	return nil
}

// plug makes the pod's network as the CNI plugins ptp and bridge do.
func (p *Pod) plug(number int) (err error) {
	n := p.Node
	if p.Net, err = newNamespace(fmt.Sprintf("%sn%d-p%d", n.lab.prefix, n.Index, number)); err != nil {
		return err
	}
	eth0, veth, err := p.Net.addVeth("eth0", n.Net, fmt.Sprintf("veth%d", number))
	if err != nil {
		return err
	}
	p.veth = veth
	v4, v6 := n.podNetworks()
	if n.options.Network == Bridge {
		err = errors.Join(
			n.Net.link.LinkSetMaster(veth, n.bridge),
			p.Net.addAddr(eth0, netip.PrefixFrom(p.IPs[0], 24)),
			p.Net.addRoute(eth0, netip.MustParsePrefix("0.0.0.0/0"), v4.Addr().Next()),
		)
		if err == nil && len(p.IPs) > 1 {
			err = errors.Join(
				p.Net.addAddr(eth0, netip.PrefixFrom(p.IPs[1], 64)),
				p.Net.addRoute(eth0, netip.MustParsePrefix("::/0"), v6.Addr().Next()),
			)
		}
		return err
	}
	gateways := []netip.Addr{v4.Addr().Next(), v6.Addr().Next()}
	everywhere := []string{"0.0.0.0/0", "::/0"}
	for i, ip := range p.IPs {
		if err := errors.Join(
			n.Net.addAddr(veth, host(gateways[i])),
			n.Net.addRoute(veth, host(ip), netip.Addr{}),
			p.Net.addAddr(eth0, host(ip)),
			p.Net.addRoute(eth0, host(gateways[i]), netip.Addr{}),
			p.Net.addRoute(eth0, netip.MustParsePrefix(everywhere[i]), gateways[i]),
		); err != nil {
			return err
		}
	}
	return nil
}

// Unplug takes the pod off the network, as the end of its sandbox does, so that its IP is free for another.
func (p *Pod) Unplug() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.client != nil {
		p.client.CloseIdleConnections()
	}
	if p.veth == nil {
		return nil
	}
	veth := p.veth
	p.veth = nil
	if err := p.Node.Net.link.LinkDel(veth); !errors.Is(err, unix.ENODEV) { // gone with its other end, wherever that was
		return err
	}
	return nil
}

func (p *Pod) close() error {
	if p.Net == nil || p.hostNetwork {
		return nil
	}
	err := p.Unplug()
	return errors.Join(err, p.Net.close())
}

// SetRunning reports the pod as running with its addresses, as kubelet does some time after its first container started.
func (p *Pod) SetRunning(ctx context.Context) error {
	return p.SetStatus(ctx, corev1.PodRunning, p.IPs...)
}

// SetStatus reports the phase and the addresses.
func (p *Pod) SetStatus(ctx context.Context, phase corev1.PodPhase, ips ...netip.Addr) error {
	start := metav1.NewTime(p.startTime)
	status := corev1.PodStatus{Phase: phase, HostIP: p.Node.IP.String(), StartTime: &start}
	for _, ip := range ips {
		status.PodIPs = append(status.PodIPs, corev1.PodIP{IP: ip.String()})
	}
	for _, ip := range p.Node.Addrs() {
		status.HostIPs = append(status.HostIPs, corev1.HostIP{IP: ip.String()})
	}
	if len(ips) > 0 {
		status.PodIP = ips[0].String()
	}
	patch, err := json.Marshal(map[string]any{"status": status})
	if err != nil {
		return err
	}
	_, err = p.Node.lab.Kube.CoreV1().Pods(p.Namespace).Patch(ctx, p.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	if err != nil {
		return fmt.Errorf("report status of pod %s/%s: %w", p.Namespace, p.Name, err)
	}
	return nil
}

// Annotate sets annotations of the pod, beside those it has.
func (p *Pod) Annotate(ctx context.Context, annotations map[string]string) error {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": annotations}})
	if err != nil {
		return err
	}
	_, err = p.Node.lab.Kube.CoreV1().Pods(p.Namespace).Patch(ctx, p.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	return err
}

// Terminate begins the pod's end: it has a deletion timestamp, and stays until Delete.
func (p *Pod) Terminate(ctx context.Context) error { return p.delete(ctx, 300) }

// Delete removes the Pod object at once, as kubelet does when the containers have ended.
func (p *Pod) Delete(ctx context.Context) error { return p.delete(ctx, 0) }

func (p *Pod) delete(ctx context.Context, grace int64) error {
	return p.Node.lab.Kube.CoreV1().Pods(p.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: &grace})
}

// Command is a program in the pod: its network, its hosts file with the names of AWS, and an environment that holds nothing
// of the machine's and no credentials. More can be appended to its Env.
func (p *Pod) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	env := append(cleanEnv(p.home),
		"AWS_CA_BUNDLE="+p.Node.lab.AWSCA, "SSL_CERT_FILE="+p.Node.lab.AWSCA, "NODE_EXTRA_CA_CERTS="+p.Node.lab.AWSCA,
		"REQUESTS_CA_BUNDLE="+p.Node.lab.AWSCA, "AWS_DEFAULT_REGION="+Region, "AWS_REGION="+Region,
		"AWS_PAGER=", "PYTHONDONTWRITEBYTECODE=1",
	)
	cmd := p.Net.command(ctx, p.Node.binds(), env, name, args...)
	cmd.Dir = p.home
	return cmd
}

// Dial connects from inside the pod to a literal address.
func (p *Pod) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return p.Net.Dial(ctx, network, address)
}

// Ping sends one ICMP echo request and waits for the reply until ctx is done, a second at most.
func (p *Pod) Ping(ctx context.Context, ip string) error {
	network, request, reply := "ip4:icmp", byte(8), byte(0)
	if strings.Contains(ip, ":") {
		network, request, reply = "ip6:ipv6-icmp", 128, 129
	}
	c, err := p.Dial(ctx, network, ip)
	if err != nil {
		return err
	}
	defer c.Close()
	packet := []byte{request, 0, 0, 0, 0x1d, 0x5e, 0, 1}
	if request == 8 { // the kernel computes ICMPv6's checksum
		sum := ^uint16(0x0800 + 0x1d5e + 1)
		packet[2], packet[3] = byte(sum>>8), byte(sum)
	}
	if _, err := c.Write(packet); err != nil {
		return err
	}
	deadline := time.Now().Add(time.Second)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := c.SetReadDeadline(deadline); err != nil {
		return err
	}
	for buf := make([]byte, 256); ; {
		n, err := c.Read(buf)
		if err != nil {
			return err
		}
		got := buf[:n]
		if request == 8 && n > 0 { // IPv4's raw sockets show the IP header
			got = got[min(n, int(got[0]&15)*4):]
		}
		// Before it was connected, the socket took whatever ICMP came from anywhere.
		if len(got) >= 8 && got[0] == reply && bytes.Equal(got[4:8], packet[4:8]) {
			return nil
		}
	}
}

// HTTP is a client inside the pod: it follows no redirect, adds no header and keeps connections.
func (p *Pod) HTTP() *http.Client {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.client == nil {
		p.client = p.Net.httpClient()
	}
	return p.client
}

func (n *Namespace) httpClient() *http.Client {
	return &http.Client{
		Transport:     &http.Transport{DialContext: n.Dial, DisableCompression: true, MaxIdleConnsPerHost: 200},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       10 * time.Second,
	}
}
