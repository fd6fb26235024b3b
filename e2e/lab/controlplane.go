package lab

import (
	"context"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// apiServerURL is where nodes find the API server, and the issuer of service account tokens.
const apiServerURL = "https://" + fabricIP + ":6443"

// ControlPlane is etcd and kube-apiserver in the fabric, with RBAC and the Node authorizer on.
type ControlPlane struct {
	ca        *authority
	dir, bin  string
	fabric    *Namespace
	etcd, api *process
}

func newControlPlane(fabric *Namespace, dir, bin string) (*ControlPlane, error) {
	for _, name := range []string{"etcd", "kube-apiserver"} {
		if _, err := os.Stat(filepath.Join(bin, name)); err != nil {
			return nil, fmt.Errorf("%w: build it once with `make cluster-bins`", err)
		}
	}
	ca, err := newAuthority("kubernetes")
	if err != nil {
		return nil, err
	}
	c := &ControlPlane{ca: ca, dir: dir, bin: bin, fabric: fabric}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	cert, key, err := ca.issue(pkix.Name{CommonName: "kube-apiserver"}, fabricIP, "127.0.0.1",
		"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost")
	if err != nil {
		return nil, err
	}
	private, public, err := serviceAccountKey()
	if err != nil {
		return nil, err
	}
	return c, writeFiles(map[string][]byte{
		c.path("ca.crt"): ca.pem, c.path("apiserver.crt"): cert, c.path("apiserver.key"): key,
		c.path("sa.key"): private, c.path("sa.pub"): public,
	})
}

func (c *ControlPlane) path(name string) string { return filepath.Join(c.dir, name) }

// Start starts both and waits until the API server is ready.
func (c *ControlPlane) Start(ctx context.Context) error {
	if err := c.startEtcd(); err != nil {
		return err
	}
	return c.StartAPIServer(ctx)
}

func (c *ControlPlane) startEtcd() (err error) {
	const client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
	c.etcd, err = startProcess("etcd", c.command(filepath.Join(c.bin, "etcd"),
		"--name=lab", "--data-dir="+c.path("etcd"), "--unsafe-no-fsync=true", "--log-level=warn",
		"--listen-client-urls="+client, "--advertise-client-urls="+client,
		"--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer, "--initial-cluster=lab="+peer,
	), newLog())
	return err
}

// StartAPIServer starts the API server and waits until it is ready.
func (c *ControlPlane) StartAPIServer(ctx context.Context) (err error) {
	c.api, err = startProcess("kube-apiserver", c.command(filepath.Join(c.bin, "kube-apiserver"),
		"--etcd-servers=http://127.0.0.1:2379", "--bind-address="+fabricIP, "--secure-port=6443", "--advertise-address="+fabricIP,
		"--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.96.0.0/24",
		"--tls-cert-file="+c.path("apiserver.crt"), "--tls-private-key-file="+c.path("apiserver.key"), "--client-ca-file="+c.path("ca.crt"),
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
		"--service-account-key-file="+c.path("sa.pub"), "--service-account-signing-key-file="+c.path("sa.key"),
		"--service-account-issuer="+apiServerURL, "--service-account-jwks-uri="+apiServerURL+"/openid/v1/jwks",
		"--profiling=false", "--v=1",
	), newLog())
	if err != nil {
		return err
	}
	config, err := c.adminConfig()
	if err != nil {
		return err
	}
	transport, err := rest.TransportFor(config)
	if err != nil {
		return err
	}
	return c.api.until(ctx, "ready", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, apiServerURL+"/readyz", nil)
		if err != nil {
			return err
		}
		resp, err := transport.RoundTrip(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("/readyz says %s: %.200s", resp.Status, body)
		}
		return err
	})
}

// StopAPIServer ends the API server as a power cut would: its connections are cut, and nobody answers at its address.
func (c *ControlPlane) StopAPIServer() { c.api.kill() }

// stop ends the API server before etcd, without which it would wait for minutes.
func (c *ControlPlane) stop() {
	c.api.kill()
	c.etcd.kill()
}

func (c *ControlPlane) command(name string, args ...string) *exec.Cmd {
	cmd := c.fabric.command(context.Background(), nil, cleanEnv(c.dir), name, args...)
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	return cmd
}

// adminConfig is a cluster administrator's, usable from this process: it dials inside the fabric.
func (c *ControlPlane) adminConfig() (*rest.Config, error) {
	cert, key, err := c.ca.issue(pkix.Name{CommonName: "lab-admin", Organization: []string{"system:masters"}})
	if err != nil {
		return nil, err
	}
	return &rest.Config{
		Host: apiServerURL, QPS: -1,
		TLSClientConfig: rest.TLSClientConfig{CAData: c.ca.pem, CertData: cert, KeyData: key},
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			return c.fabric.Dial(ctx, network, address)
		},
		Proxy: http.ProxyURL(nil),
	}, nil
}

// writeKubeconfig writes a kubeconfig file for a bearer of the token.
func (c *ControlPlane) writeKubeconfig(path, token string) error {
	config := clientcmdapi.NewConfig()
	config.Clusters["lab"] = &clientcmdapi.Cluster{Server: apiServerURL, CertificateAuthorityData: c.ca.pem}
	config.AuthInfos["lab"] = &clientcmdapi.AuthInfo{Token: token}
	config.Contexts["lab"] = &clientcmdapi.Context{Cluster: "lab", AuthInfo: "lab"}
	config.CurrentContext = "lab"
	return clientcmd.WriteToFile(*config, path)
}

// allowDiscovery lets anybody read the keys that sign service account tokens, as the public OIDC endpoint of a real cluster
// does.
func allowDiscovery(ctx context.Context, kube kubernetes.Interface) error {
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "public-service-account-issuer-discovery"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "system:service-account-issuer-discovery"},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.GroupKind, Name: "system:unauthenticated"}},
	}
	_, err := kube.RbacV1().ClusterRoleBindings().Create(ctx, binding, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("open service account issuer discovery: %w", err)
	}
	return nil
}

var errNoBins = errors.New("no directory for the cluster's binaries: set XDG_CACHE_HOME or HOME")

// defaultBin is where `make cluster-bins` puts etcd and kube-apiserver.
func defaultBin() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", errNoBins
	}
	return filepath.Join(cache, "imdsgate-e2e", "bin"), nil
}
