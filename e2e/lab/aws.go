package lab

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/imds"
)

// The account that every role of the lab belongs to, and the role of every node in it.
const (
	Account     = "123456789012"
	NodeRole    = "node-role"
	NodeRoleARN = "arn:aws:iam::" + Account + ":role/" + NodeRole
)

// What every stand-in for AWS lists to those that may.
var (
	Buckets = []string{"ledger", "pictures"}
	Groups  = []string{"admins", "auditors"}
)

// AWS is the stand-in that one node and its pods talk to, at an address of its own.
type AWS struct {
	*aws.Server
	*aws.Endpoint

	mu   sync.Mutex
	node aws.Credentials // of the node role
}

// startAWS starts the node's AWS and the hosts file that leads there. The node role may do anything: whoever had its
// credentials would notice.
func (n *Node) startAWS(ctx context.Context) error {
	server, err := aws.New(aws.Options{
		Region: Region, Buckets: Buckets, Groups: Groups, NodeRoleARN: NodeRoleARN,
		Roles: []aws.Role{{ARN: NodeRoleARN, Allow: []string{"*"}}},
		Providers: []aws.Provider{{
			Account: Account, Issuer: apiServerURL, ClientIDs: []string{"sts.amazonaws.com"},
			Keys: n.lab.ControlPlane.Keys,
		}},
	})
	if err != nil {
		return err
	}
	ip := netip.AddrFrom4([4]byte{172, 30, 2, byte(n.Index)})
	if err := n.lab.fabric.addAddr(n.lab.bridge, host(ip)); err != nil {
		return err
	}
	hosts := aws.Hosts(Region)
	cert, err := n.lab.awsCA.tlsCertificate(append(hosts, ip.String())...)
	if err != nil {
		return err
	}
	n.AWS = &AWS{Server: server, Endpoint: &aws.Endpoint{
		Handler: server, TLS: &tls.Config{Certificates: []tls.Certificate{cert}},
		Listen: func() (net.Listener, error) {
			return n.lab.fabric.Listen(context.WithoutCancel(ctx), "tcp", netip.AddrPortFrom(ip, 443).String())
		},
	}}
	if err := n.AWS.Start(); err != nil {
		return err
	}
	if err := os.WriteFile(n.hosts(), hostsFile(ip, hosts), 0o644); err != nil {
		return err
	}
	// Nobody answers there: every name of the lab is in the hosts file.
	return os.WriteFile(n.resolvConf(), []byte("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n"), 0o644)
}

func (n *Node) stopAWS() error {
	if n.AWS == nil {
		return nil
	}
	return n.AWS.Kill()
}

// Role makes an IAM role, team/NAME for instance, that the node role and, by their tokens, all service accounts may assume,
// and returns its ARN.
func (n *Node) Role(name string, allow ...string) (string, error) {
	arn := "arn:aws:iam::" + Account + ":role/" + name
	return arn, n.AWS.SetRole(aws.Role{ARN: arn, Allow: allow, Trust: []aws.Trust{
		{AWS: NodeRoleARN, Actions: []string{aws.ActionAssumeRole, aws.ActionTagSession}},
		{Federated: ProviderARN(), Subject: "system:serviceaccount:*", Audience: "sts.amazonaws.com"},
	}})
}

// ProviderARN is what trust policies call the cluster.
func ProviderARN() string { return aws.Provider{Account: Account, Issuer: apiServerURL}.ARN() }

// nodeCredentials are what the metadata endpoint answers: the same for hours, as the real one.
func (a *AWS) nodeCredentials() (imds.Credentials, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if time.Until(a.node.Expires) < time.Hour {
		c, err := a.NodeCredentials()
		if err != nil {
			return imds.Credentials{}, err
		}
		a.node = c
	}
	return imds.Credentials{
		Role: NodeRole, AccessKeyID: a.node.AccessKeyID, SecretAccessKey: a.node.SecretAccessKey,
		SessionToken: a.node.SessionToken, Expires: a.node.Expires,
	}, nil
}

// nodeCredentials answers the node and, where nothing keeps them away, its pods, as the real endpoint does.
func (l *Lab) nodeCredentials(source netip.Addr) (imds.Credentials, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, n := range l.nodes {
		if n == nil {
			continue
		}
		v4, v6 := n.podNetworks()
		if source == n.IP || source == n.IPv6 || v4.Contains(source) || v6.Contains(source) {
			c, err := n.AWS.nodeCredentials()
			return c, err == nil
		}
	}
	return imds.Credentials{}, false
}

// Keys fetches the public keys of service account tokens, as AWS does from a cluster's OIDC endpoint.
func (c *ControlPlane) Keys(ctx context.Context) ([]byte, error) {
	transport := &http.Transport{DialContext: c.fabric.Dial, TLSClientConfig: &tls.Config{RootCAs: c.ca.pool()}, DisableKeepAlives: true}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, apiServerURL+"/openid/v1/jwks", nil)
	if err != nil {
		return nil, err
	}
	resp, err := (&http.Client{Transport: transport, Timeout: 5 * time.Second}).Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("the API server says %s: %.200s", resp.Status, body)
	}
	return body, err
}
