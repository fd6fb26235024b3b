//go:build minio

package minio

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"

	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
)

// TestMinIO is the founding scenario with foreign judges: the API server signs the pod's token, MinIO
// verifies it against the API server's keys and issues a session, and MinIO's S3 accepts what the AWS
// CLI in the pod signs with it.
func TestMinIO(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	l, err := lab.Start(ctx, lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	node, err := l.AddNode(ctx, lab.NodeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	server := startMinIO(ctx, t, node)
	t.Logf("MinIO at %s, role %s", server.url, server.role)

	if err := l.ServiceAccount(ctx, "shop", "cart", map[string]string{"eks.amazonaws.com/role-arn": server.role}); err != nil {
		t.Fatal(err)
	}
	daemon, err := node.LaunchDaemon(ctx, lab.DaemonOptions{
		Flags: []string{"-issuer", "web-identity"},
		Env:   []string{"AWS_ENDPOINT_URL_STS=" + server.url, "AWS_CA_BUNDLE=" + server.ca},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("imdsgate:\n%s", daemon.Log().Tail(40))
		}
	})
	if err := daemon.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	with, err := node.AddPod(ctx, lab.PodSpec{Namespace: "shop", ServiceAccount: "cart"})
	if err != nil {
		t.Fatal(err)
	}
	without, err := node.AddPod(ctx, lab.PodSpec{Namespace: "shop", ServiceAccount: "visitor"})
	if err != nil {
		t.Fatal(err)
	}

	if out, err := server.aws(ctx, with, []string{"AWS_ACCESS_KEY_ID=" + rootUser, "AWS_SECRET_ACCESS_KEY=" + rootSecret}, "s3", "mb", "s3://ledger"); err != nil {
		t.Fatalf("make a bucket as MinIO's root: %v: %s", err, out)
	}
	out, err := server.aws(ctx, with, nil, "s3", "ls")
	if err != nil || !strings.Contains(out, "ledger") {
		t.Errorf("aws s3 ls in the annotated pod: %v: %s; want the bucket ledger", err, out)
	}
	t.Logf("annotated pod: %s", out)
	start := time.Now()
	out, err = server.aws(ctx, without, nil, "s3", "ls")
	if err == nil || !strings.Contains(out, "Unable to locate credentials") {
		t.Errorf("aws s3 ls in the pod without annotation: %v: %s; want no credentials", err, out)
	}
	t.Logf("pod without annotation, after %v: %s", time.Since(start).Round(time.Millisecond), out)

	// MinIO judges by the role ARN, too: one it does not know is refused.
	unknown := strings.Replace(server.role, ":role/", ":role/x", 1)
	if err := l.ServiceAccount(ctx, "shop", "stranger", map[string]string{"eks.amazonaws.com/role-arn": unknown}); err != nil {
		t.Fatal(err)
	}
	stranger, err := node.AddPod(ctx, lab.PodSpec{Namespace: "shop", ServiceAccount: "stranger"})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := server.aws(ctx, stranger, nil, "s3", "ls"); err == nil || !strings.Contains(out, "Unable to locate credentials") {
		t.Errorf("aws s3 ls with a role that MinIO does not know: %v: %s; want no credentials", err, out)
	}
	if err := node.Untouched(ctx, imds.Expected{}); err != nil {
		t.Error(err)
	}
}

const rootUser, rootSecret = "root", "root-secret"

// server is a running MinIO.
type server struct {
	url  string
	ca   string // file of its certificate
	role string // ARN of the role that a token with the default audience may assume
}

// startMinIO runs the server in a pod of the node and waits until it serves.
func startMinIO(ctx context.Context, t *testing.T, node *lab.Node) *server {
	t.Helper()
	binary, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	pod, err := node.AddPod(ctx, lab.PodSpec{Namespace: "minio"})
	if err != nil {
		t.Fatal(err)
	}
	address := netip.AddrPortFrom(pod.IPs[0], 9000)
	dir := t.TempDir()
	certs := filepath.Join(dir, "certs")
	if err := os.MkdirAll(filepath.Join(certs, "CAs"), 0o700); err != nil {
		t.Fatal(err)
	}
	s := &server{url: "https://" + address.String(), ca: filepath.Join(certs, "public.crt")}
	if err := writeCertificate(certs, address.Addr()); err != nil {
		t.Fatal(err)
	}
	// MinIO fetches the API server's keys as anybody could, and trusts its certificate authority.
	kubeconfig, err := clientcmd.LoadFromFile(node.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	var api string
	for _, c := range kubeconfig.Clusters {
		api = c.Server
		ca := c.CertificateAuthorityData
		if len(ca) == 0 {
			if ca, err = os.ReadFile(c.CertificateAuthority); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(certs, "CAs", "kubernetes.crt"), ca, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := pod.Command(context.Background(), binary, "server", "--certs-dir", certs, "--address", address.String(), filepath.Join(dir, "data"))
	cmd.Env = append(cmd.Env,
		"MINIO_ROOT_USER="+rootUser, "MINIO_ROOT_PASSWORD="+rootSecret,
		"MINIO_UPDATE=off", "MINIO_BROWSER=off", "MINIO_REGION="+lab.Region,
		"MINIO_IDENTITY_OPENID_CONFIG_URL="+api+"/.well-known/openid-configuration",
		"MINIO_IDENTITY_OPENID_CLIENT_ID=sts.amazonaws.com", "MINIO_IDENTITY_OPENID_ROLE_POLICY=readwrite",
	)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Cancel()
		_ = cmd.Wait()
	})
	// The role's name is derived from the client id; MinIO prints it once it serves.
	arn := regexp.MustCompile(`arn:minio:iam:\S*:role/[\w-]+`)
	found := make(chan string, 1)
	var said bytes.Buffer
	go func() {
		defer close(found)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			fmt.Fprintln(&said, lines.Text())
			if m := arn.FindString(lines.Text()); m != "" {
				found <- m
				_, _ = io.Copy(io.Discard, out)
				return
			}
		}
	}()
	role, ok := <-found
	if !ok {
		t.Fatalf("MinIO ended without naming a role:\n%s", said.String())
	}
	s.role = role
	return s
}

// aws runs the AWS CLI against the server in a pod, with everything it wrote.
func (s *server) aws(ctx context.Context, pod *lab.Pod, env []string, args ...string) (string, error) {
	cmd := pod.Command(ctx, "/usr/bin/aws", append([]string{"--endpoint-url", s.url}, args...)...)
	cmd.Env = append(append(cmd.Env, "AWS_CA_BUNDLE="+s.ca), env...)
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// binary is where build.sh puts the server.
func binary() (string, error) {
	cache := os.Getenv("XDG_CACHE_HOME")
	if cache == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", err
		}
		cache = filepath.Join(home, ".cache")
	}
	path := filepath.Join(cache, "imdsgate-e2e", "bin", "minio")
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%w: build it once with e2e/minio/build.sh", err)
	}
	return path, nil
}

// writeCertificate writes public.crt and private.key, self-signed for the address.
func writeCertificate(dir string, ip netip.Addr) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "minio"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{ip.AsSlice()}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "public.crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o600); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "private.key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600)
}
