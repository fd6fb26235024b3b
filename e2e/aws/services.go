package aws

import (
	"context"
	"fmt"
	"strings"
	"time"
)

func (s *Server) listBuckets(_ context.Context, r *request) (any, *refusal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.allowed(r.caller, ActionListBuckets, "*") {
		return nil, &refusal{403, "AccessDenied", fmt.Sprintf("User: %s is not authorized to perform: %s because no identity-based policy allows the %[2]s action",
			r.caller.arn, ActionListBuckets)}
	}
	answer := listBucketsResult{Owner: ownerXML{ID: strings.Repeat("0", 52) + r.caller.account}}
	for _, b := range s.buckets {
		answer.Buckets = append(answer.Buckets, bucketXML{b, s.started.UTC().Format(time.RFC3339)})
	}
	return answer, nil
}

func (s *Server) listGroups(_ context.Context, r *request) (any, *refusal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	resource := fmt.Sprintf("arn:aws:iam::%s:group/", r.caller.account)
	if !s.allowed(r.caller, ActionListGroups, resource) {
		return nil, &refusal{403, "AccessDenied", fmt.Sprintf("User: %s is not authorized to perform: %s on resource: %s because no identity-based policy allows the %[2]s action",
			r.caller.arn, ActionListGroups, resource)}
	}
	answer := listGroupsResponse{Meta: r.meta()}
	for _, g := range s.groups {
		answer.Groups = append(answer.Groups, groupXML{"/", g, "AGPA" + strings.TrimPrefix(roleID(g), "AROA"), resource + g, s.started.UTC().Format(time.RFC3339)})
	}
	return answer, nil
}
