package imds

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
)

// Expected is what the node itself may ask of the endpoint.
type Expected struct {
	Nodes []netip.Addr // every address of the node
	// NodeRole: the daemon fetches the node's own credentials, to sign AssumeRole with.
	NodeRole bool
	// Paths below /latest/meta-data/ beside the default pass-through.
	Paths []string
}

// passThrough is the contract's list of paths that reach the endpoint by default.
var passThrough = []string{
	"ami-id", "ami-launch-index", "hostname", "instance-id", "instance-life-cycle", "instance-type", "local-hostname",
	"local-ipv4", "mac", "placement/availability-zone", "placement/availability-zone-id", "placement/region",
	"services/domain", "services/partition",
}

// Headers that the daemon or the AWS SDK send. Anything else came from a pod.
var headers = []string{
	"Accept", "Accept-Encoding", "Amz-Sdk-Invocation-Id", "Amz-Sdk-Request", "Connection", "Content-Length", "User-Agent",
	"X-Aws-Ec2-Metadata-Token", "X-Aws-Ec2-Metadata-Token-Ttl-Seconds",
}

// Untouched says whether the endpoint is as the pods may leave it: no packet of theirs has arrived, on any port, in any
// protocol, and every request of the node is one that the daemon builds from its table, or the SDK's own for the node role.
func (s *Server) Untouched(ctx context.Context, pods []netip.Addr, node Expected) error {
	var errs []error
	packets, err := s.Packets(ctx, pods...)
	if err != nil {
		return err
	}
	for _, p := range packets {
		errs = append(errs, fmt.Errorf("a pod reached the node's metadata endpoint: %s", p))
	}
	for _, r := range s.Requests(pods...) {
		errs = append(errs, fmt.Errorf("a pod's request reached the node's metadata endpoint: %s", r))
	}
	for _, r := range s.Requests(node.Nodes...) {
		if !node.Permits(r) {
			errs = append(errs, fmt.Errorf("the node sent a request to its metadata endpoint that no table of the daemon built: %s %v", r, r.Header))
		}
	}
	packets, err = s.Packets(ctx, node.Nodes...)
	if err != nil {
		return err
	}
	for _, p := range packets {
		if p.Protocol != "tcp" || p.Port != 80 {
			errs = append(errs, fmt.Errorf("the node sent something else than HTTP to its metadata endpoint: %s", p))
		}
	}
	return errors.Join(errs...)
}

// Permits tells whether a request of the node is one that the daemon builds, or the SDK's own for the node role.
func (e Expected) Permits(r Request) bool {
	// A pod's packet may leave with the node's address. What it says of itself is then all that tells.
	if agent := r.Header.Get("User-Agent"); !strings.HasPrefix(agent, "imdsgate") && !strings.HasPrefix(agent, "aws-sdk-go-v2/") {
		return false
	}
	for name := range r.Header {
		if !slices.Contains(headers, name) {
			return false
		}
	}
	if r.Method == http.MethodPut {
		return r.Target == "/latest/api/token"
	}
	path, ok := strings.CutPrefix(r.Target, "/latest/meta-data/")
	if !ok || r.Method != http.MethodGet {
		return false
	}
	if rest, ok := strings.CutPrefix(path, "iam/security-credentials/"); ok && e.NodeRole {
		return !strings.Contains(rest, "/")
	}
	path = strings.TrimSuffix(path, "/")
	return slices.Contains(passThrough, path) || slices.Contains(e.Paths, path)
}
