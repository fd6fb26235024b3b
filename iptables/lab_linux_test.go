package iptables

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// insideLab is set, to the path of a directory, in the process that runs inside the namespaces.
const insideLab = "IMDSGATE_KERNEL_TEST"

// kernelTest runs f in a new network namespace, the node, where root's rights hold; without root in a new user namespace too.
// Addresses of the metadata endpoint are dialled nowhere else.
func kernelTest(t *testing.T, f func(*testing.T)) {
	t.Helper()
	if testing.Short() {
		t.Skip("kernel test: needs namespaces and iptables: go test without -short, or make test-kernel")
	}
	if os.Getenv(insideLab) != "" {
		mine, err := os.Readlink("/proc/self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		if outside := os.Getenv(insideLab + "_OUTSIDE"); mine == outside || outside == "" {
			t.Fatalf("refusing to run in the machine's own network namespace (%s)", mine)
		}
		f(t)
		return
	}
	t.Parallel()
	for tool, pkg := range map[string]string{"iptables-nft": "iptables", "iptables-legacy": "iptables", "nft": "nftables", "ip": "iproute2"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%v: apt-get install %s", err, pkg)
		}
	}
	outside, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), insideLab+"="+dir, insideLab+"_OUTSIDE="+outside, "XTABLES_LOCKFILE="+filepath.Join(dir, "xtables.lock"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	runtime.LockOSThread() // Pdeathsig is about the thread
	defer runtime.UnlockOSThread()
	out, err := cmd.CombinedOutput()
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) {
		t.Fatalf("no user namespace: %v: run as root, or set the sysctls user.max_user_namespaces=10000, kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0", err)
	}
	if err != nil {
		t.Fatalf("inside the namespaces: %v\n%s", err, out)
	}
	if !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Fatalf("inside the namespaces the test did not run:\n%s", out)
	}
	if testing.Verbose() {
		t.Logf("%s", out)
	}
}

// Addresses of the lab. The node is this process's own namespace.
var (
	node4, node6 = netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00:a::1")
	gate4, gate6 = netip.AddrPortFrom(node4, 8254), netip.AddrPortFrom(node6, 8254)
	next4, next6 = netip.AddrPortFrom(node4, 8255), netip.AddrPortFrom(node6, 8255)
)

// lab is a node with an uplink to the real endpoint, a pod on a point-to-point link and a pod on a bridge.
type lab struct {
	t           testing.TB
	node        *host
	fabric      *host // where the real endpoint is
	ptp, bridge *host
	pods        []*host

	mu      sync.Mutex
	seen    map[netip.Addr]int // packets to the endpoint that arrived there, by source
	markers chan string
	mark    int
}

type host struct {
	name   string
	ns     netns.NsHandle
	v4, v6 netip.Addr
}

func newLab(t testing.TB) *lab {
	t.Helper()
	l := &lab{t: t, seen: map[netip.Addr]int{}, markers: make(chan string, 64)}
	own, err := netns.Get()
	must(t, err)
	l.node = &host{"node", own, node4, node6}
	l.fabric = l.newHost("fabric", "10.0.0.2", "fd00:a::2")
	l.ptp = l.newHost("ptp pod", "10.244.1.2", "fd00:b:1::2")
	l.bridge = l.newHost("bridge pod", "10.244.2.2", "fd00:b:2::2")
	l.pods = []*host{l.ptp, l.bridge}

	settings := []string{
		"net/ipv4/ip_forward=1", "net/ipv6/conf/all/forwarding=1",
		"net/ipv4/conf/all/rp_filter=1", "net/ipv4/conf/default/rp_filter=1", // strict
		"net/ipv4/icmp_ratelimit=0", "net/ipv6/icmp/ratelimit=0", // every refusal is told at once
	}
	for _, s := range settings {
		file, value, _ := strings.Cut(s, "=")
		must(t, os.WriteFile("/proc/sys/"+file, []byte(value), 0o644))
	}
	// As with kube-proxy, every connection is tracked from the start.
	run(t, "nft add table inet lab")
	run(t, "nft add chain inet lab forward { type filter hook forward priority 0 ; }")
	run(t, "nft add rule inet lab forward ct state established accept")
	l.node.up(t, "lo")
	l.link("eth0", l.fabric, "eth0")
	l.node.addr(t, "eth0", "10.0.0.1/24", "fd00:a::1/64")
	l.fabric.up(t, "lo")
	l.fabric.addr(t, "eth0", "10.0.0.2/24", "fd00:a::2/64")
	l.fabric.addr(t, "lo", "169.254.169.254/32", "fd00:ec2::254/128")
	l.fabric.route(t, "10.244.0.0/16", "10.0.0.1", "eth0")
	l.fabric.route(t, "fd00:b::/32", "fd00:a::1", "eth0")
	for _, r := range [][2]string{{"0.0.0.0/0", "10.0.0.2"}, {"169.254.169.254/32", "10.0.0.2"}, {"::/0", "fd00:a::2"}, {"fd00:ec2::254/128", "fd00:a::2"}} {
		l.node.route(t, r[0], r[1], "eth0")
	}
	// As the ptp plugin does it.
	l.link("veth-ptp", l.ptp, "eth0")
	l.node.addr(t, "veth-ptp", "10.244.1.1/32", "fd00:b:1::1/128")
	l.node.route(t, "10.244.1.2/32", "", "veth-ptp")
	l.node.route(t, "fd00:b:1::2/128", "", "veth-ptp")
	// As the bridge plugin does it.
	must(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "cni0"}}))
	l.node.up(t, "cni0")
	l.node.addr(t, "cni0", "10.244.2.1/24", "fd00:b:2::1/64")
	l.link("veth-br", l.bridge, "eth0")
	bridge, err := netlink.LinkByName("cni0")
	must(t, err)
	port, err := netlink.LinkByName("veth-br")
	must(t, err)
	must(t, netlink.LinkSetMaster(port, bridge))
	for i, p := range l.pods {
		p.up(t, "lo")
		p.addr(t, "eth0", p.v4.String()+"/24", p.v6.String()+"/64")
		p.route(t, "0.0.0.0/0", fmt.Sprintf("10.244.%d.1", i+1), "eth0")
		p.route(t, "::/0", fmt.Sprintf("fd00:b:%d::1", i+1), "eth0")
	}
	l.sniff()
	for _, f := range families() {
		for _, port := range []uint16{80, 8080} {
			l.fabric.serve(t, netip.AddrPortFrom(f.endpoint(), port), "real")
		}
		l.fabric.echo(t, netip.AddrPortFrom(f.endpoint(), 5353))
	}
	return l
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newHost makes a namespace that lives as long as the test.
func (l *lab) newHost(name, v4, v6 string) *host {
	h := &host{name: name, v4: netip.MustParseAddr(v4), v6: netip.MustParseAddr(v6)}
	must(l.t, onThread(func() (err error) {
		h.ns, err = netns.New()
		return err
	}))
	l.t.Cleanup(func() { h.ns.Close() })
	return h
}

// onThread runs f on a thread that ends with it, and never on the main thread, whose namespace is that of /proc/net.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			done <- onThread(f)
			runtime.UnlockOSThread()
			return
		}
		done <- f()
	}()
	return <-done
}

// do runs f in the host's namespace.
func (h *host) do(f func() error) error {
	return onThread(func() error {
		if err := netns.Set(h.ns); err != nil {
			return err
		}
		return f()
	})
}

// link joins the node and a host by a pair of interfaces.
func (l *lab) link(name string, h *host, peer string) {
	l.t.Helper()
	must(l.t, netlink.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: peer, PeerNamespace: netlink.NsFd(int(h.ns)),
	}))
	l.node.up(l.t, name)
	h.up(l.t, peer)
}

func (h *host) withLink(t testing.TB, name string, f func(netlink.Link) error) {
	t.Helper()
	err := h.do(func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return f(link)
	})
	if err != nil {
		t.Fatalf("%s, %s: %v", h.name, name, err)
	}
}

func (h *host) up(t testing.TB, name string) {
	t.Helper()
	h.withLink(t, name, netlink.LinkSetUp)
}

func (h *host) addr(t testing.TB, name string, addrs ...string) {
	t.Helper()
	h.withLink(t, name, func(link netlink.Link) error {
		for _, s := range addrs {
			a, err := netlink.ParseAddr(s)
			if err != nil {
				return err
			}
			a.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrAdd(link, a); err != nil {
				return err
			}
		}
		return nil
	})
}

func (h *host) route(t testing.TB, dst, via, dev string) {
	t.Helper()
	h.withLink(t, dev, func(link netlink.Link) error {
		_, ipnet, err := net.ParseCIDR(dst)
		if err != nil {
			return err
		}
		r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipnet, Gw: net.ParseIP(via)}
		if via == "" {
			r.Scope = netlink.SCOPE_LINK
		}
		return netlink.RouteAdd(r)
	})
}

// serve greets every connection with a line, and again for every line it gets.
func (h *host) serve(t testing.TB, at netip.AddrPort, greeting string) {
	t.Helper()
	var ln net.Listener
	must(t, h.do(func() (err error) {
		ln, err = net.Listen("tcp", at.String())
		return err
	}))
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for in := bufio.NewReader(c); ; {
					if _, err := io.WriteString(c, greeting+"\n"); err != nil {
						return
					}
					if _, err := in.ReadString('\n'); err != nil {
						return
					}
				}
			}()
		}
	}()
}

// echo sends datagrams back.
func (h *host) echo(t testing.TB, at netip.AddrPort) {
	t.Helper()
	var c net.PacketConn
	must(t, h.do(func() (err error) {
		c, err = net.ListenPacket("udp", at.String())
		return err
	}))
	t.Cleanup(func() { c.Close() })
	go func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(buf[:n], from)
		}
	}()
}

// gates serves both families at a port of the node.
func (l *lab) gates(port uint16) {
	l.t.Helper()
	for _, a := range []netip.Addr{node4, node6} {
		l.node.serve(l.t, netip.AddrPortFrom(a, port), fmt.Sprintf("gate:%d", port))
	}
}

// sniff counts what arrives at the real endpoint, of any protocol.
func (l *lab) sniff() {
	l.t.Helper()
	var f *os.File
	must(l.t, l.fabric.do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(nl.Swap16(unix.ETH_P_ALL)))
		f = os.NewFile(uintptr(fd), "packets")
		return err
	}))
	l.t.Cleanup(func() { f.Close() })
	go func() {
		buf := make([]byte, 65536)
		for {
			n, err := f.Read(buf)
			if err != nil {
				return
			}
			p := buf[:n]
			var src, dst netip.Addr
			switch {
			case n >= 20 && p[0]>>4 == 4:
				src, dst = netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
			case n >= 40 && p[0]>>4 == 6:
				src, dst = netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
			}
			if i := bytes.Index(p, []byte("marker:")); i >= 0 {
				l.markers <- string(p[i:])
			} else if dst == ipv4.endpoint() || dst == ipv6.endpoint() {
				l.mu.Lock()
				l.seen[src]++
				l.mu.Unlock()
			}
		}
	}()
}

// arrived returns how many packets of the pods have come to the endpoint since it was last asked.
func (l *lab) arrived() int {
	l.t.Helper()
	l.mark++
	marker := fmt.Sprintf("marker:%d", l.mark)
	c, err := net.Dial("udp", netip.AddrPortFrom(l.fabric.v4, 9).String()) // the same way: behind it is what was sent before it
	must(l.t, err)
	_, err = io.WriteString(c, marker)
	must(l.t, err)
	c.Close()
	for got := ""; got != marker; {
		select {
		case got = <-l.markers:
		case <-time.After(5 * time.Second):
			l.t.Fatal("the node's own packets do not come to the uplink")
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, p := range l.pods {
		n += l.seen[p.v4] + l.seen[p.v6]
	}
	clear(l.seen)
	return n
}

// dial connects and returns the greeting.
func (h *host) dial(to netip.AddrPort) (string, error) { return h.dialFor(to, long) }

func (h *host) dialFor(to netip.AddrPort, limit time.Duration) (got string, err error) {
	c, got, err := h.connect(to, limit)
	if err == nil {
		c.Close()
	}
	return got, err
}

// open connects, reads the greeting and keeps the connection.
func (h *host) open(to netip.AddrPort) (net.Conn, string, error) { return h.connect(to, long) }

func (h *host) connect(to netip.AddrPort, limit time.Duration) (c net.Conn, got string, err error) {
	err = h.do(func() error {
		c, err = net.DialTimeout("tcp", to.String(), limit)
		return err
	})
	if err != nil {
		return nil, "", err
	}
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return nil, "", err
	}
	got, err = bufio.NewReader(c).ReadString('\n')
	if err != nil {
		c.Close()
		return nil, "", err
	}
	return c, strings.TrimSpace(got), nil
}

// again asks over an open connection.
func again(c net.Conn) (string, error) {
	if _, err := io.WriteString(c, "\n"); err != nil {
		return "", err
	}
	got, err := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSpace(got), err
}

// datagram sends a UDP datagram or an ICMP echo and waits for the answer or for the refusal.
func (h *host) datagram(network, to string, limit time.Duration, packet []byte, answered func([]byte) bool) error {
	return h.do(func() error {
		c, err := net.Dial(network, to)
		if err != nil {
			return err
		}
		defer c.Close()
		raw, err := c.(syscall.Conn).SyscallConn()
		if err != nil {
			return err
		}
		level, option := unix.IPPROTO_IP, unix.IP_RECVERR
		if strings.Contains(to, ":") && strings.Count(to, ":") > 1 {
			level, option = unix.IPPROTO_IPV6, unix.IPV6_RECVERR
		}
		var set error
		if err := raw.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), level, option, 1) }); err != nil || set != nil {
			return errors.Join(err, set)
		}
		if err := c.SetDeadline(time.Now().Add(limit)); err != nil {
			return err
		}
		if _, err := c.Write(packet); err != nil {
			return err
		}
		for buf := make([]byte, 1500); ; {
			n, err := c.Read(buf)
			if err != nil {
				return err
			}
			if answered(buf[:n]) {
				return nil
			}
		}
	})
}

func (h *host) udp(f family, limit time.Duration) error {
	return h.datagram("udp", netip.AddrPortFrom(f.endpoint(), 5353).String(), limit, []byte("hello"), func(b []byte) bool { return string(b) == "hello" })
}

func (h *host) ping(f family, limit time.Duration) error {
	network, request, reply := "ip4:icmp", byte(8), byte(0)
	if f == ipv6 {
		network, request, reply = "ip6:ipv6-icmp", 128, 129
	}
	p := []byte{request, 0, 0, 0, 'i', 'm', 0, 1}
	sum := ^(uint32(request)<<8 + 'i'<<8 + 'm' + 1) // IPv6: by the kernel
	p[2], p[3] = byte(sum>>8), byte(sum)
	return h.datagram(network, f.endpoint().String(), limit, p, func(b []byte) bool {
		if f == ipv4 {
			b = b[20:] // the kernel hands out the IPv4 header too
		}
		return b[0] == reply
	})
}

// refused asserts that no packet of any pod, of any protocol, reaches the endpoint. TCP port 80 is not refused but answered by
// redirected, if that names an answer. How soon a refusal is told is TestKernelRefusalIsTold's business: Linux sends a source
// five of them and then one a second.
func (l *lab) refused(when, redirected string, fs ...family) {
	l.t.Helper()
	l.arrived()
	var probes sync.WaitGroup
	for _, f := range orAll(fs) {
		for _, pod := range l.pods {
			fail := func(format string, a ...any) {
				l.t.Helper()
				l.t.Errorf("%s: %s, %s: %s", when, f.String(), pod.name, fmt.Sprintf(format, a...))
			}
			probes.Go(func() {
				limit := long
				if redirected == "" || redirected == either {
					limit = short
				}
				got, err := pod.dialFor(netip.AddrPortFrom(f.endpoint(), 80), limit)
				if got != redirected && !(redirected == either && got != "real") {
					fail("TCP port 80: got %q, %v, want %q", got, err, redirected)
				}
			})
			probes.Go(func() {
				if got, err := pod.dialFor(netip.AddrPortFrom(f.endpoint(), 8080), short); err == nil {
					fail("TCP port 8080: got %q", got)
				}
			})
			probes.Go(func() {
				if pod.udp(f, short) == nil {
					fail("UDP was answered")
				}
			})
			probes.Go(func() {
				if pod.ping(f, short) == nil {
					fail("ICMP was answered")
				}
			})
		}
	}
	probes.Wait()
	if n := l.arrived(); n > 0 {
		l.t.Errorf("%s: %d packets of pods arrived at the real endpoint", when, n)
	}
}

// either: a repair is going on, and TCP port 80 may be ours again, or still refused.
const either = "either"

// How long a probe waits for what must come, and for what must not: the counter at the endpoint is what decides.
const long, short = 3 * time.Second, 200 * time.Millisecond

func orAll(fs []family) []family {
	if len(fs) == 0 {
		return families()
	}
	return fs
}

// nodeReaches asserts that the node itself reaches the real endpoint.
func (l *lab) nodeReaches(when string, fs ...family) {
	l.t.Helper()
	for _, f := range orAll(fs) {
		for _, port := range []uint16{80, 8080} {
			if got, err := l.node.dial(netip.AddrPortFrom(f.endpoint(), port)); got != "real" {
				l.t.Errorf("%s: %s: the node at TCP port %d: got %q, %v", when, f.String(), port, got, err)
			}
		}
		if err := l.node.udp(f, long); err != nil {
			l.t.Errorf("%s: %s: the node by UDP: %v", when, f.String(), err)
		}
		if err := l.node.ping(f, long); err != nil {
			l.t.Errorf("%s: %s: the node by ICMP: %v", when, f.String(), err)
		}
	}
}

// unprotected asserts that pods do reach the endpoint: without it a lab without a way there would pass every test.
func (l *lab) unprotected(when string) {
	l.t.Helper()
	for _, f := range families() {
		for _, pod := range l.pods {
			for _, port := range []uint16{80, 8080} {
				if got, err := pod.dial(netip.AddrPortFrom(f.endpoint(), port)); got != "real" {
					l.t.Fatalf("%s: %s, %s: TCP port %d: got %q, %v: the lab is broken", when, f.String(), pod.name, port, got, err)
				}
			}
			if err := errors.Join(pod.udp(f, long), pod.ping(f, long)); err != nil {
				l.t.Fatalf("%s: %s, %s: %v: the lab is broken", when, f.String(), pod.name, err)
			}
		}
	}
	if l.arrived() == 0 {
		l.t.Fatal("the counter at the endpoint is broken")
	}
}

// run runs a command on the node.
func run(t testing.TB, command string) string {
	t.Helper()
	args := strings.Fields(command)
	out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return string(out)
}

var volatile = regexp.MustCompile(`(?m)^#.*\n|\[\d+:\d+\]`)

// rules returns everything there is on the node: routing rules and both back ends.
func rules(t testing.TB) map[string]string {
	t.Helper()
	all := map[string]string{}
	commands := []string{"ip rule", "ip -6 rule"}
	for _, kind := range kinds {
		for _, f := range families() {
			for _, table := range []string{"nat", "filter", "mangle"} { // legacy lists all of them for the machine's root alone
				commands = append(commands, commandOf(f, kind)+"-save -t "+table)
			}
		}
	}
	for _, c := range commands {
		all[c] = volatile.ReplaceAllString(run(t, c), "")
	}
	return all
}

// eventually polls, because the event to wait for is the kernel's state.
func eventually(t testing.TB, limit time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	for !ok() {
		if time.Since(start) > limit {
			t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
	return time.Since(start)
}
