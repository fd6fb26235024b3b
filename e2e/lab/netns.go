package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// namespaceDir is where iproute2 looks for names, so that `ip netns exec` works on the lab's.
const namespaceDir = "/run/netns"

// ErrMachineNamespace is what Do returns instead of running in a network namespace with a way out.
var ErrMachineNamespace = errors.New("this is the machine's own network namespace: its metadata endpoint may be a real one")

// Namespace is a named network namespace of the lab. It is safe for concurrent use.
type Namespace struct {
	Name string
	file *os.File
	link *netlink.Handle
}

// newNamespace makes a network namespace with its loopback up and duplicate address detection off.
func newNamespace(name string) (_ *Namespace, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("make network namespace %s: %w", name, err)
		}
	}()
	if err := os.MkdirAll(namespaceDir, 0o755); err != nil {
		return nil, err
	}
	path := filepath.Join(namespaceDir, name)
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
		if err != nil {
			return err
		}
		f.Close()
		return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	})
	if err != nil {
		return nil, err
	}
	n := &Namespace{Name: name}
	if n.file, err = os.Open(path); err != nil {
		return nil, err
	}
	if n.link, err = netlink.NewHandleAt(netns.NsHandle(n.file.Fd())); err != nil {
		return nil, err
	}
	lo, err := n.link.LinkByName("lo")
	if err != nil {
		return nil, err
	}
	if err := n.link.LinkSetUp(lo); err != nil {
		return nil, err
	}
	return n, n.Sysctl("net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0")
}

// Path is the file that nsenter takes.
func (n *Namespace) Path() string { return filepath.Join(namespaceDir, n.Name) }

// close lets go of the namespace and of its name.
func (n *Namespace) close() error {
	n.link.Close()
	n.file.Close()
	return removeNamespace(n.Path())
}

func removeNamespace(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Do runs fn on a thread inside the namespace. Sockets that fn opens stay in it; goroutines that fn starts do not.
func (n *Namespace) Do(fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", n.Name, err)
		}
		if err := refuseMachine(); err != nil {
			return err
		}
		return fn()
	})
}

// onThread runs fn on a thread of its own and puts the thread back into the machine's namespace afterwards. A thread is not
// simply thrown away: children that it started would get their parent-death signal.
func onThread(fn func() error) error {
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		machine, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			errc <- err
			return
		}
		defer machine.Close()
		err = fn()
		if back := unix.Setns(int(machine.Fd()), unix.CLONE_NEWNET); back != nil {
			errc <- errors.Join(err, back) // the thread stays locked and ends with this goroutine
			return
		}
		runtime.UnlockOSThread()
		errc <- err
	}()
	return <-errc
}

// machineNamespace is where this process started, read before any thread of it can have moved.
var machineNamespace, machineErr = os.Readlink("/proc/self/ns/net")

func refuseMachine() error {
	here, err := os.Readlink("/proc/thread-self/ns/net")
	if err := errors.Join(err, machineErr); err != nil {
		return err
	}
	// In a container the first process's may not be shown; then it is ours, or we are confined already.
	first, err := os.Readlink("/proc/1/ns/net")
	if here == machineNamespace || err == nil && here == first {
		return ErrMachineNamespace
	}
	return nil
}

// Dial connects from inside the namespace. The address is a literal IP and port: a name would be looked up by the machine's
// resolver.
func (n *Namespace) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		if _, ipErr := netip.ParseAddr(address); ipErr != nil {
			return nil, fmt.Errorf("dial %s: %w", address, err)
		}
	}
	err = n.Do(func() error {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen listens inside the namespace.
func (n *Namespace) Listen(ctx context.Context, network, address string) (ln net.Listener, err error) {
	err = n.Do(func() error {
		ln, err = (&net.ListenConfig{}).Listen(ctx, network, address)
		return err
	})
	return ln, err
}

// Sysctl sets kernel parameters of the namespace, each as name=value.
func (n *Namespace) Sysctl(settings ...string) error {
	return n.Do(func() error {
		for _, s := range settings {
			name, value, _ := strings.Cut(s, "=")
			// A file of /proc/sys/net belongs to the namespace of the thread that opens it.
			path := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if errors.Is(err, os.ErrNotExist) && strings.HasPrefix(name, "net.ipv6.") {
				continue // a kernel without IPv6
			}
			if err != nil {
				return fmt.Errorf("set %s: %w", s, err)
			}
			_, err = f.WriteString(value)
			if err := errors.Join(err, f.Close()); err != nil {
				return fmt.Errorf("set %s: %w", s, err)
			}
		}
		return nil
	})
}

// addAddr gives a link an address.
func (n *Namespace) addAddr(link netlink.Link, p netip.Prefix) error {
	flags := 0
	if p.Addr().Is6() {
		flags = unix.IFA_F_NODAD
	}
	if err := n.link.AddrAdd(link, &netlink.Addr{IPNet: ipNet(p), Flags: flags}); err != nil {
		return fmt.Errorf("add address %s to %s in %s: %w", p, link.Attrs().Name, n.Name, err)
	}
	return nil
}

// addRoute adds a route to dst by the gateway, or on the link when there is none.
func (n *Namespace) addRoute(link netlink.Link, dst netip.Prefix, via netip.Addr) error {
	r := &netlink.Route{Dst: ipNet(dst), Scope: netlink.SCOPE_LINK}
	if link != nil {
		r.LinkIndex = link.Attrs().Index
	}
	if via.IsValid() {
		r.Gw, r.Scope = via.AsSlice(), netlink.SCOPE_UNIVERSE
	}
	if err := n.link.RouteReplace(r); err != nil {
		return fmt.Errorf("add route to %s in %s: %w", dst, n.Name, err)
	}
	return nil
}

// addVeth makes a pair: name here, peerName in the peer's namespace, both up.
func (n *Namespace) addVeth(name string, peer *Namespace, peerName string) (here, there netlink.Link, err error) {
	v := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: name},
		PeerName:  peerName, PeerNamespace: netlink.NsFd(peer.file.Fd()),
	}
	if err := n.link.LinkAdd(v); err != nil {
		return nil, nil, fmt.Errorf("add veth %s in %s: %w", name, n.Name, err)
	}
	if here, err = n.link.LinkByName(name); err == nil {
		there, err = peer.link.LinkByName(peerName)
	}
	if err == nil {
		err = errors.Join(n.link.LinkSetUp(here), peer.link.LinkSetUp(there))
	}
	if err == nil {
		err = errors.Join(n.waitUp(here), peer.waitUp(there))
	}
	if err != nil {
		return nil, nil, fmt.Errorf("set up veth %s in %s: %w", name, n.Name, err)
	}
	return here, there, nil
}

// waitUp waits until the link carries packets. The kernel switches the first end of a veth on some time after the second one
// is up; what is sent before is lost, and TCP tries again after a second only.
func (n *Namespace) waitUp(link netlink.Link) error {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		l, err := n.link.LinkByIndex(link.Attrs().Index)
		if err != nil || l.Attrs().OperState == netlink.OperUp {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s is still %s", l.Attrs().Name, l.Attrs().OperState)
		}
	}
}

// addBridge makes a bridge that is up. Its hardware address is fixed: otherwise it would change with every port, and what
// neighbours have learned of it would be wrong.
func (n *Namespace) addBridge(name string, mac net.HardwareAddr) (netlink.Link, error) {
	snooping := false
	b := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: mac}, MulticastSnooping: &snooping}
	if err := n.link.LinkAdd(b); err != nil {
		return nil, fmt.Errorf("add bridge %s in %s: %w", name, n.Name, err)
	}
	link, err := n.link.LinkByName(name)
	if err == nil {
		err = n.link.LinkSetUp(link)
	}
	if err != nil {
		return nil, fmt.Errorf("set up bridge %s in %s: %w", name, n.Name, err)
	}
	return link, nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// host is the address as a prefix of its own.
func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
