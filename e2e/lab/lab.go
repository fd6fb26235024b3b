package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/imdsgate/imdsgate/e2e/imds"
)

// The fabric's own addresses.
const (
	fabricIP   = "172.30.0.1"
	fabricIPv6 = "fd00:30::1"
)

// Options of a Lab. The zero value is good.
type Options struct {
	Bin    string // directory of etcd and kube-apiserver; empty: where `make cluster-bins` puts them
	Daemon string // the imdsgate binary; empty: built from this checkout when it is first needed
	Race   bool   // build it with the race detector
}

// Lab is a fabric with a control plane, and the nodes behind it. It is safe for concurrent use.
type Lab struct {
	// Kube is a cluster administrator's client.
	Kube kubernetes.Interface
	// ControlPlane can be stopped and started again.
	ControlPlane *ControlPlane
	// IMDS is the real metadata endpoint of every node.
	IMDS *imds.Server
	// AWSCA is the file of the certificate authority that every process in the lab trusts for AWS.
	AWSCA string

	options Options
	prefix  string // of the names of this lab's namespaces
	dir     string
	fabric  *Namespace
	bridge  netlink.Link
	awsCA   *authority
	janitor *janitor

	daemonOnce sync.Once
	daemonErr  error

	mu    sync.Mutex
	nodes []*Node // by index - 1; nil once closed
	names map[string]int
}

// Start makes a lab: in about four seconds it has a working control plane.
func Start(ctx context.Context, o Options) (_ *Lab, err error) {
	if err := check(); err != nil {
		return nil, err
	}
	if o.Bin == "" {
		if o.Bin, err = defaultBin(); err != nil {
			return nil, err
		}
	}
	if err := removeStale(); err != nil {
		return nil, fmt.Errorf("remove what an earlier lab left: %w", err)
	}
	l := &Lab{options: o, prefix: fmt.Sprintf("%s%d-", namePrefix, os.Getpid()), IMDS: imds.New(), names: map[string]int{}}
	if l.dir, err = os.MkdirTemp("", l.prefix); err != nil {
		return nil, err
	}
	if l.janitor, err = startJanitor(l.prefix, l.dir); err != nil {
		return nil, errors.Join(err, os.RemoveAll(l.dir))
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start the lab: %w", err), l.Close())
		}
	}()
	if err := l.startFabric(ctx); err != nil {
		return nil, err
	}
	if l.ControlPlane, err = newControlPlane(l.fabric, filepath.Join(l.dir, "control-plane"), o.Bin); err != nil {
		return nil, err
	}
	if err := l.ControlPlane.Start(ctx); err != nil {
		return nil, err
	}
	config, err := l.ControlPlane.adminConfig()
	if err != nil {
		return nil, err
	}
	if l.Kube, err = kubernetes.NewForConfig(config); err != nil {
		return nil, err
	}
	return l, allowDiscovery(ctx, l.Kube)
}

// startFabric makes the network that stands for the cloud, and the metadata endpoint in it.
func (l *Lab) startFabric(ctx context.Context) (err error) {
	if l.awsCA, err = newAuthority("aws"); err != nil {
		return err
	}
	l.AWSCA = filepath.Join(l.dir, "aws-ca.pem")
	if err := os.WriteFile(l.AWSCA, l.awsCA.pem, 0o644); err != nil {
		return err
	}
	if l.fabric, err = newNamespace(l.prefix + "fabric"); err != nil {
		return err
	}
	if err := l.fabric.Sysctl("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"); err != nil {
		return err
	}
	if l.bridge, err = l.fabric.addBridge("br0", net.HardwareAddr{2, 0, 0x1d, 0, 0, 1}); err != nil {
		return err
	}
	for _, a := range []string{fabricIP + "/16", fabricIPv6 + "/64", imds.IPv4.String() + "/32", imds.IPv6.String() + "/128"} {
		if err := l.fabric.addAddr(l.bridge, netip.MustParsePrefix(a)); err != nil {
			return err
		}
	}
	l.IMDS.Credentials = l.nodeCredentials
	for _, ip := range []netip.Addr{imds.IPv4, imds.IPv6} {
		ln, err := l.fabric.Listen(ctx, "tcp", netip.AddrPortFrom(ip, 80).String())
		if err != nil {
			return err
		}
		go l.IMDS.Serve(ln)
	}
	return l.fabric.Do(func() error { return l.IMDS.Capture("br0") })
}

// Close ends every process of the lab and removes everything. It may be called on a lab that did not start.
func (l *Lab) Close() error {
	l.mu.Lock()
	nodes := l.nodes
	l.mu.Unlock()
	var errs []error
	for _, n := range nodes {
		if n != nil {
			errs = append(errs, n.Close())
		}
	}
	if l.ControlPlane != nil {
		l.ControlPlane.stop()
	}
	errs = append(errs, l.IMDS.Close())
	if l.fabric != nil {
		errs = append(errs, l.fabric.close())
	}
	return errors.Join(append(errs, l.janitor.close())...)
}

// Unique returns the name with a number that makes it the first of its kind in this lab.
func (l *Lab) Unique(name string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.names[name]++
	return fmt.Sprintf("%s-%d", name, l.names[name])
}

// Namespace makes a Kubernetes namespace, or sets the annotations of the one that is there.
func (l *Lab) Namespace(ctx context.Context, name string, annotations map[string]string) error {
	object := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: annotations}}
	c := l.Kube.CoreV1().Namespaces()
	_, err := c.Create(ctx, object, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = c.Update(ctx, object, metav1.UpdateOptions{})
	}
	if err != nil {
		return fmt.Errorf("apply namespace %s: %w", name, err)
	}
	return nil
}

// ServiceAccount makes a service account, and its namespace when there is none, or sets its annotations.
func (l *Lab) ServiceAccount(ctx context.Context, namespace, name string, annotations map[string]string) error {
	object := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Annotations: annotations}}
	c := l.Kube.CoreV1().ServiceAccounts(namespace)
	_, err := c.Create(ctx, object, metav1.CreateOptions{})
	if apierrors.IsNotFound(err) {
		if err := l.ensureNamespace(ctx, namespace); err != nil {
			return err
		}
		_, err = c.Create(ctx, object, metav1.CreateOptions{})
	}
	if apierrors.IsAlreadyExists(err) {
		_, err = c.Update(ctx, object, metav1.UpdateOptions{})
	}
	if err != nil {
		return fmt.Errorf("apply service account %s/%s: %w", namespace, name, err)
	}
	return nil
}

func (l *Lab) ensureNamespace(ctx context.Context, name string) error {
	_, err := l.Kube.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("make namespace %s: %w", name, err)
	}
	return nil
}

// hostsFile is the /etc/hosts that sends the names to ip.
func hostsFile(ip netip.Addr, names []string) []byte {
	return fmt.Appendf(nil, "127.0.0.1 localhost\n::1 localhost\n%s %s\n", ip, strings.Join(names, " "))
}
